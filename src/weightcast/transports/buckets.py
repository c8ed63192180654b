"""Buckets: copies cut and packed into byte buffers of one size, in a schedule that both sides derive alike.

Pure. A piece starts at a multiple of 256 bytes of its bucket and lies there row-major. It travels in the published type or in the
destination's, whichever is narrower: values are cast to that type on the sending side, and to the destination's, where that is
another one, on the receiving side.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from weightcast.errors import InvalidInput
from weightcast.layout import contiguous_strides
from weightcast.manifest import ALIGNMENT, align
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, split


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A copy, or a part of one; the type in which its values travel; and the byte of the bucket where the values begin."""

    copy: Copy
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes that travel."""
        return self.copy.region.numel * itemsize_of(self.dtype)


MAX_BUCKET_NBYTES = 2**34
"""A longer bucket is a mistake: two of them are allocated for each pair."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """What one buffer carries. ``nbytes`` bytes of the buffer travel."""

    pieces: tuple[Piece, ...]
    nbytes: int


def check_bucket_nbytes(bucket_nbytes: int) -> None:
    """Raise InvalidInput unless a bucket of that size can hold at least one aligned piece."""
    is_count = isinstance(bucket_nbytes, int) and not isinstance(bucket_nbytes, bool)
    if not is_count or not ALIGNMENT <= bucket_nbytes <= MAX_BUCKET_NBYTES or bucket_nbytes % ALIGNMENT:
        raise InvalidInput(
            f"bucket_nbytes is a multiple of {ALIGNMENT} from {ALIGNMENT} to {MAX_BUCKET_NBYTES}, not {bucket_nbytes!r}",
            field="bucket_nbytes",
            hint="Leave it out: each transport has a size that suits it",
        )


def schedule(copies: Iterable[Copy], bucket_nbytes: int) -> tuple[Bucket, ...]:
    """Fill buckets in the order of ``copies``, each as full as it gets. A copy larger than a bucket is cut, and empty copies are left
    out."""
    check_bucket_nbytes(bucket_nbytes)
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    end = 0
    for copy in split(copies, bucket_nbytes):
        if copy.region.numel == 0:
            continue
        piece = Piece(copy=copy, dtype=travels_as(copy), offset=align(end))
        if piece.offset + piece.nbytes > bucket_nbytes:
            buckets.append(Bucket(pieces=tuple(pieces), nbytes=end))
            pieces, piece = [], msgspec.structs.replace(piece, offset=0)
        pieces.append(piece)
        end = piece.offset + piece.nbytes
    if pieces:
        buckets.append(Bucket(pieces=tuple(pieces), nbytes=end))
    return tuple(buckets)


def travels_as(copy: Copy) -> str:
    """The narrower of the published type and the destination's. Where ``via`` is empty one cast is all there is, at whichever
    end: then it is the narrower of the holding's type and the destination's."""
    published = copy.via or copy.src_dtype
    return published if itemsize_of(published) < itemsize_of(copy.dst_dtype) else copy.dst_dtype


def into_bucket(piece: Piece) -> Copy:
    """Return the copy from the source's memory into a memory whose one storage is the bucket's buffer."""
    copy = piece.copy
    return msgspec.structs.replace(
        copy,
        dst_storage=0,
        dst_dtype=piece.dtype,
        dst_offset=piece.offset // itemsize_of(piece.dtype),
        dst_strides=contiguous_strides(copy.sizes),
        via=copy.via if piece.dtype == copy.dst_dtype else "",
    )


def out_of_bucket(piece: Piece) -> Copy:
    """Return the copy from a memory whose one storage is the bucket's buffer to the destination."""
    copy = piece.copy
    return msgspec.structs.replace(
        copy,
        src_storage=0,
        src_dtype=piece.dtype,
        src_offset=piece.offset // itemsize_of(piece.dtype),
        src_strides=contiguous_strides(copy.sizes),
        via="",
    )
