"""Reads: copies as buckets of ranges of the trainer's memory, for a worker that reads these ranges itself. Pure.

A copy whose source is contiguous is one range. One that is not is either read row by row, or with all that lies between its first and its
last byte, whichever is less work; values are picked, cast and put in their places on the way out of the bucket. Ranges that lie side by
side in the trainer's memory lie side by side in the bucket and are one range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from weightcast.layout import Region, contiguous_strides
from weightcast.layout import geometry as geo
from weightcast.manifest import ALIGNMENT, align
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, narrowed

RANGE_NBYTES = 4096
"""What a range costs beside its bytes, in bytes."""


class Range(msgspec.Struct, frozen=True):
    """Bytes of one storage of the trainer, and the byte of the bucket where they begin."""

    storage: int
    start: int
    nbytes: int
    place: int


class ReadBucket(msgspec.Struct, frozen=True, kw_only=True):
    """What one buffer takes in at a time, and the copies out of that buffer, whose bytes are storage 0."""

    ranges: tuple[Range, ...]
    copies: tuple[Copy, ...]
    nbytes: int


def read_buckets(copies: Iterable[Copy], bucket_nbytes: int) -> tuple[ReadBucket, ...]:
    """Cut copies into buckets of about ``bucket_nbytes``, in the order in which they lie in the trainer's memory. Empty copies are left
    out."""
    filling, buckets = _Filling(), []
    for copy in sorted(copies, key=lambda copy: (copy.src_storage, copy.src_offset * itemsize_of(copy.src_dtype))):
        if copy.region.numel == 0:
            continue
        for piece in _pieces(_by_stride(copy), bucket_nbytes):
            if filling.ranges and filling.end + piece.nbytes + ALIGNMENT > bucket_nbytes:
                buckets.append(filling.bucket())
                filling = _Filling()
            filling.add(piece)
    if filling.ranges:
        buckets.append(filling.bucket())
    return tuple(buckets)


class _Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a copy: its rows in the trainer's storage, in bytes, and the strides of its values in the bucket, in elements."""

    copy: Copy
    starts: tuple[int, ...]
    row_nbytes: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.starts) * self.row_nbytes


class _Filling:
    """A bucket that is being filled."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self.copies: list[Copy] = []
        self.end = 0

    def add(self, piece: _Piece) -> None:
        copy, itemsize = piece.copy, itemsize_of(piece.copy.src_dtype)
        place = self._place(copy.src_storage, piece.starts[0])
        for number, start in enumerate(piece.starts):
            self._read(Range(copy.src_storage, start, piece.row_nbytes, place + number * piece.row_nbytes))
        self.copies.append(
            msgspec.structs.replace(copy, src_storage=0, src_offset=place // itemsize, src_strides=piece.strides)
        )
        self.end = max(self.end, place + piece.nbytes)

    def bucket(self) -> ReadBucket:
        return ReadBucket(ranges=tuple(self.ranges), copies=tuple(self.copies), nbytes=self.end)

    def _place(self, storage: int, start: int) -> int:
        """Bytes lie in the bucket as they do in their storage, modulo the alignment; right behind the last range if they do so there."""
        if self.ranges:
            last = self.ranges[-1]
            gap = start - (last.start + last.nbytes)
            if last.storage == storage and 0 <= gap < ALIGNMENT and last.place + last.nbytes == self.end:
                shifted = last.place - last.start + start
                if (last.place - last.start) % ALIGNMENT == 0:
                    return shifted
        return align(self.end) + start % ALIGNMENT

    def _read(self, new: Range) -> None:
        """Add a range, or make the last one longer; what is between two that lie close together is read as well."""
        if self.ranges:
            last = self.ranges[-1]
            gap = new.start - (last.start + last.nbytes)
            moved_alike = new.place - new.start == last.place - last.start
            if last.storage == new.storage and moved_alike and 0 <= gap < ALIGNMENT:
                nbytes = new.start + new.nbytes - last.start
                self.ranges[-1] = Range(last.storage, last.start, nbytes, last.place)
                return
        self.ranges.append(new)


def _by_stride(copy: Copy) -> Copy:
    """The same values with their dimensions in the order in which they lie in the source, the outermost first."""
    order = sorted(range(len(copy.sizes)), key=lambda dim: -copy.src_strides[dim])
    region = copy.region

    def ordered(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    return msgspec.structs.replace(
        copy,
        region=Region(name=region.name, offsets=ordered(region.offsets), sizes=ordered(region.sizes)),
        src_strides=ordered(copy.src_strides),
        dst_strides=ordered(copy.dst_strides),
    )


def _pieces(copy: Copy, max_nbytes: int) -> Iterator[_Piece]:
    """Parts of a copy that fit into a bucket, one element at least."""
    itemsize = itemsize_of(copy.src_dtype)
    whole_nbytes = geo.span(copy.sizes, copy.src_strides) * itemsize
    inner = _contiguous_from(copy)
    row_nbytes = math.prod(copy.sizes[inner:]) * itemsize
    rows = copy.region.numel * itemsize // row_nbytes
    if rows * (row_nbytes + RANGE_NBYTES) < whole_nbytes + RANGE_NBYTES:
        for part in _cut(copy, max_nbytes, by_span=False):
            yield _rows(part, min(inner, len(part.sizes)))
        return
    for part in _cut(copy, max_nbytes, by_span=True):
        nbytes = geo.span(part.sizes, part.src_strides) * itemsize
        yield _Piece(copy=part, starts=(part.src_offset * itemsize,), row_nbytes=nbytes, strides=part.src_strides)


def _rows(copy: Copy, inner: int) -> _Piece:
    """A part of a copy row by row, packed."""
    itemsize = itemsize_of(copy.src_dtype)
    starts = [copy.src_offset]
    for size, stride in zip(copy.sizes[:inner], copy.src_strides[:inner], strict=True):
        starts = [start + index * stride for start in starts for index in range(size)]
    return _Piece(
        copy=copy,
        starts=tuple(start * itemsize for start in starts),
        row_nbytes=math.prod(copy.sizes[inner:]) * itemsize,
        strides=contiguous_strides(copy.sizes),
    )


def _contiguous_from(copy: Copy) -> int:
    """The first dimension from which on the values lie one after the other."""
    dim, step = len(copy.sizes), 1
    while dim and (copy.src_strides[dim - 1] == step or copy.sizes[dim - 1] == 1):
        dim -= 1
        step *= copy.sizes[dim]
    return dim


def _cut(copy: Copy, max_nbytes: int, *, by_span: bool) -> Iterator[Copy]:
    """Cut along outer dimensions until the span, or the values, of each part have at most ``max_nbytes``."""
    itemsize = itemsize_of(copy.src_dtype)
    nbytes = (geo.span(copy.sizes, copy.src_strides) if by_span else copy.region.numel) * itemsize
    dim = next((number for number, size in enumerate(copy.sizes) if size > 1), None)
    if nbytes <= max_nbytes or dim is None:
        yield copy
        return
    one = narrowed(copy, dim, 0, 1)
    one_nbytes = (geo.span(one.sizes, one.src_strides) if by_span else one.region.numel) * itemsize
    stride_nbytes = copy.src_strides[dim] * itemsize if by_span else one_nbytes
    size = max(1, 1 + (max_nbytes - one_nbytes) // max(stride_nbytes, 1))
    for start in range(0, copy.sizes[dim], size):
        part = narrowed(copy, dim, start, min(size, copy.sizes[dim] - start))
        yield from _cut(part, max_nbytes, by_span=by_span)


__all__ = ["Range", "ReadBucket", "read_buckets"]
