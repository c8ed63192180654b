"""Copies: which bytes go from which holding to which landing, how copies are cut, and how they melt into runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from weightcast.layout import Placement, Region
from weightcast.layout import geometry as geo
from weightcast.manifest import ALIGNMENT
from weightcast.manifest.dtypes import itemsize_of


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """One box of values from a source storage to a destination storage; offsets and strides in elements of each dtype.

    What lands is cast(landing's type, cast(published type, value)), each rounding to nearest even. Where the published type is
    neither the holding's nor the landing's, ``via`` names it and values are cast twice; otherwise ``via`` is empty.
    """

    region: Region
    src_storage: int
    src_dtype: str
    src_offset: int
    src_strides: tuple[int, ...]
    dst_storage: int
    dst_dtype: str
    dst_offset: int
    dst_strides: tuple[int, ...]
    via: str = ""
    is_whole: bool = False
    """The box is the whole tensor: in an arena, what follows it up to the next multiple of 256 bytes is padding."""
    part: int = 0
    """Copies of one part are transferred together: the window of a stream, or 0 for all copies of a source that lies still."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.region.sizes

    @property
    def is_plain(self) -> bool:
        """Whether the bytes land as they are held: no cast, not even there and back."""
        return self.src_dtype == self.dst_dtype and not self.via

    @property
    def nbytes(self) -> int:
        """Bytes that land: the box in the destination's dtype."""
        return self.region.numel * itemsize_of(self.dst_dtype)


def parts_of(copies: Sequence[Copy]) -> dict[int, tuple[Copy, ...]]:
    """The copies by part, in the order in which parts are transferred; without copies one empty part."""
    parts: dict[int, list[Copy]] = {}
    for copy in copies:
        parts.setdefault(copy.part, []).append(copy)
    return {part: tuple(parts[part]) for part in sorted(parts)} or {0: ()}


def nbytes_of(copies: Iterable[Copy]) -> int:
    """Bytes that land."""
    return sum(copy.nbytes for copy in copies)


def copies_digest(copies: Sequence[Copy]) -> str:
    """Hex SHA-256 of some copies; equal on both sides exactly when these have the same ones."""
    return hashlib.sha256(msgspec.msgpack.encode(list(copies))).hexdigest()


def split(copies: Iterable[Copy], max_nbytes: int) -> Iterator[Copy]:
    """Cut copies along their outer dimensions until each has at most ``max_nbytes`` (at least one element)."""
    for copy in copies:
        yield from _split_one(copy, max_nbytes)


def _split_one(copy: Copy, max_nbytes: int) -> Iterator[Copy]:
    if copy.nbytes <= max_nbytes:
        yield copy
        return
    dim = next((d for d, size in enumerate(copy.sizes) if size > 1), None)
    if dim is None:
        yield copy
        return
    row_nbytes = copy.nbytes // copy.sizes[dim]
    step = max(1, max_nbytes // row_nbytes)
    for start in range(0, copy.sizes[dim], step):
        size = min(step, copy.sizes[dim] - start)
        yield from _split_one(narrowed(copy, dim, start, size), max_nbytes)


def narrowed(copy: Copy, dim: int, start: int, size: int) -> Copy:
    """A part of a copy: ``size`` indices of one dimension, from ``start`` on."""
    region = copy.region
    offsets = geo.replaced(region.offsets, dim, region.offsets[dim] + start)
    return msgspec.structs.replace(
        copy,
        region=Region(name=region.name, offsets=offsets, sizes=geo.replaced(region.sizes, dim, size)),
        src_offset=copy.src_offset + start * copy.src_strides[dim],
        dst_offset=copy.dst_offset + start * copy.dst_strides[dim],
        is_whole=False,
    )


def landing_of(copy: Copy) -> Placement:
    """Where a copy's values land."""
    return Placement(
        region=copy.region,
        dtype=copy.dst_dtype,
        storage=copy.dst_storage,
        offset=copy.dst_offset,
        strides=copy.dst_strides,
    )


def shared_landings(copies: Sequence[Copy]) -> set[int]:
    """Which of the copies (by index) may write where another one writes, too, as those of tied parameters do.

    What such a copy wrote is known only when all are done, so it is no use digesting it on the way.
    """
    extents = []
    for index, copy in enumerate(copies):
        if copy.nbytes:
            itemsize = itemsize_of(copy.dst_dtype)
            start = copy.dst_offset * itemsize
            extent = geo.span(copy.sizes, copy.dst_strides) * itemsize
            extents.append((copy.dst_storage, start, start + extent, index))
    shared: set[int] = set()
    storage, furthest, owner = -1, 0, -1
    for where, start, end, index in sorted(extents):
        if where == storage and start < furthest:
            shared |= {index, owner}
        if where != storage or end > furthest:
            storage, furthest, owner = where, end, index
    return shared


def slices(copies: Iterable[Copy], max_nbytes: int) -> Iterator[list[Copy]]:
    """The copies in groups of about ``max_nbytes``, larger ones cut."""
    group: list[Copy] = []
    nbytes = 0
    for copy in split(copies, max_nbytes):
        if group and nbytes + copy.nbytes > max_nbytes:
            yield group
            group, nbytes = [], 0
        group.append(copy)
        nbytes += copy.nbytes
    if group:
        yield group


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that are contiguous at both ends and need no cast: one memcpy. Offsets in bytes."""

    src_storage: int
    src_offset: int
    dst_storage: int
    dst_offset: int
    nbytes: int
    is_whole: bool = False
    """Ends with the end of a tensor (see Copy.is_whole)."""


def as_run(copy: Copy) -> Run | None:
    """The copy as one run of bytes, or None when it is strided or casts."""
    if not copy.is_plain:
        return None
    if not (geo.is_contiguous(copy.sizes, copy.src_strides) and geo.is_contiguous(copy.sizes, copy.dst_strides)):
        return None
    itemsize = itemsize_of(copy.dst_dtype)
    return Run(
        src_storage=copy.src_storage,
        src_offset=copy.src_offset * itemsize,
        dst_storage=copy.dst_storage,
        dst_offset=copy.dst_offset * itemsize,
        nbytes=math.prod(copy.sizes) * itemsize,
        is_whole=copy.is_whole,
    )


def merge(copies: Iterable[Copy], *, across_padding: bool = False) -> tuple[list[Run], list[Copy]]:
    """Runs joined where both ends continue (in source order), and the copies that cannot be runs.

    ``across_padding`` (both memories are arenas) also joins over the zeros between one whole tensor and the next.
    """
    runs: list[geo.Run] = []
    rest: list[Copy] = []
    for copy in copies:
        if copy.region.numel == 0:
            continue
        run = as_run(copy)
        if run is None:
            rest.append(copy)
        else:
            slack = ALIGNMENT - 1 if across_padding and run.is_whole else 0
            where, starts = (run.src_storage, run.dst_storage), (run.src_offset, run.dst_offset)
            runs.append(geo.Run(where, starts, run.nbytes, slack))
    merged = [
        Run(src_storage=src, src_offset=src_offset, dst_storage=dst, dst_offset=dst_offset, nbytes=nbytes)
        for (src, dst), (src_offset, dst_offset), nbytes, _ in geo.joined(runs, alignment=ALIGNMENT)
    ]
    return merged, rest
