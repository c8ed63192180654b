"""Buckets: copies cut and packed into byte buffers of one size, in a schedule that both sides derive alike.

Pure. A piece starts at a multiple of 256 bytes of its bucket and lies there row-major in the destination's dtype: casts
happen on the sending side, so what travels is what lands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import torch

from weightcast.dtypes import itemsize_of
from weightcast.errors import InvalidInput
from weightcast.layout import contiguous_strides
from weightcast.manifest import ALIGNMENT, align
from weightcast.memory import Memory
from weightcast.plan import Copy, split
from weightcast.replay import Replay


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A copy (or a part of one) and the byte of the bucket where its values begin."""

    copy: Copy
    offset: int


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """What one buffer carries; ``nbytes`` of it travel."""

    pieces: tuple[Piece, ...]
    nbytes: int


def check_bucket_nbytes(bucket_nbytes: int) -> None:
    """Raise InvalidInput unless a bucket of that size can hold at least one aligned piece."""
    if bucket_nbytes < ALIGNMENT or bucket_nbytes % ALIGNMENT:
        raise InvalidInput(
            f"bucket_nbytes is a positive multiple of {ALIGNMENT}, not {bucket_nbytes}", field="bucket_nbytes"
        )


def schedule(copies: Iterable[Copy], bucket_nbytes: int) -> tuple[Bucket, ...]:
    """Fill buckets greedily in the order of ``copies``; a copy larger than a bucket is cut. Empty copies vanish."""
    check_bucket_nbytes(bucket_nbytes)
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    end = 0
    for copy in split(copies, bucket_nbytes):
        if copy.region.numel == 0:
            continue
        offset = align(end)
        if offset + copy.nbytes > bucket_nbytes:
            buckets.append(Bucket(pieces=tuple(pieces), nbytes=end))
            pieces, offset = [], 0
        pieces.append(Piece(copy=copy, offset=offset))
        end = offset + copy.nbytes
    if pieces:
        buckets.append(Bucket(pieces=tuple(pieces), nbytes=end))
    return tuple(buckets)


def packer(bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> Replay:
    """Compiled copies from ``memory`` into ``buffer``, a flat uint8 tensor of at least ``bucket.nbytes``."""
    copies = [into_bucket(piece) for piece in bucket.pieces]
    return Replay(copies, memory, Memory([buffer]))


def unpacker(bucket: Bucket, buffer: torch.Tensor, memory: Memory) -> Replay:
    """Compiled copies from ``buffer`` to their destinations in ``memory``."""
    copies = [out_of_bucket(piece) for piece in bucket.pieces]
    return Replay(copies, Memory([buffer]), memory)


def new_buffers(buckets: Sequence[Bucket], count: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """``count`` buffers (fewer when there are fewer buckets), each as large as the largest bucket."""
    nbytes = max((bucket.nbytes for bucket in buckets), default=0)
    return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(min(count, len(buckets)))]


def into_bucket(piece: Piece) -> Copy:
    """The copy from the source's memory into a memory whose one storage is the bucket's buffer; casts happen here."""
    copy = piece.copy
    return msgspec.structs.replace(
        copy,
        dst_storage=0,
        dst_offset=piece.offset // itemsize_of(copy.dst_dtype),
        dst_strides=contiguous_strides(copy.sizes),
    )


def out_of_bucket(piece: Piece) -> Copy:
    """The copy from a memory whose one storage is the bucket's buffer to the destination."""
    copy = piece.copy
    return msgspec.structs.replace(
        copy,
        src_storage=0,
        src_dtype=copy.dst_dtype,
        src_offset=piece.offset // itemsize_of(copy.dst_dtype),
        src_strides=contiguous_strides(copy.sizes),
    )
