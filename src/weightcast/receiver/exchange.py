"""How a staged commit makes a version live where parameters may not move: exchange with a shadow, or copy out of one of two.

exchange   one shadow: what was live is in it afterwards; each side is read and written
alternate  two shadows, one of which equals what is live: a commit is one copy, half the traffic, and the way back is the other
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from weightcast.layout import Placement
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy
from weightcast.plan.replay import Replay
from weightcast.receiver.swap import Swap

if TYPE_CHECKING:
    from weightcast.content.proven_on_gpu import ProvenReplay


MAX_RANGES = 4096
"""A placement of more rows than this is exchanged by three strided copies, where nobody shares its bytes."""


class Exchange:
    """The exchange of two memories with the same layout, compiled once. A second ``run`` undoes the first one. ``run`` allocates
    nothing.

    Every byte that a placement touches is exchanged once, however many placements share the byte.
    """

    def __init__(self, live: Memory, shadow: Memory, placements: Sequence[Placement]) -> None:
        runs, alone = _split(placements)
        self._swap = Swap([(_bytes(live, run), _bytes(shadow, run)) for run in runs])
        self._strided = []
        for place in alone:
            sides = [
                memory.view(place.storage, place.dtype, place.offset, place.region.sizes, place.strides)
                for memory in (live, shadow)
            ]
            self._strided.append((*sides, torch.empty_like(sides[0], memory_format=torch.contiguous_format)))

    def warm_up(self) -> None:
        """Compile what the first ``run`` would compile. Exchanges nothing."""
        self._swap.warm_up()

    @torch.no_grad()
    def run(self) -> None:
        """Exchange all values. On a GPU the work is queued on the current stream."""
        self._swap.run()
        for live, shadow, scratch in self._strided:
            scratch.copy_(live)
            live.copy_(shadow)
            shadow.copy_(scratch)


class CopyOut:
    """The copy of all landings from a shadow to the live storages, compiled once. On a GPU the copy also takes the digest of what
    landed."""

    def __init__(self, live: Memory, shadow: Memory, placements: Sequence[Placement], manifest: Manifest) -> None:
        copies = distinct_copies(placements)
        device = live.storages[0].device if live.storages else torch.device("cpu")
        self._proven: ProvenReplay | None = None
        self._replay: Replay | ProvenReplay
        if device.type == "cuda":
            from weightcast.content.proven_on_gpu import ProvenReplay

            self._replay = self._proven = ProvenReplay(copies, shadow, live, manifest, device)
        else:
            self._replay = Replay(copies, shadow, live)
        self._is_all = len(copies) == len(placements)

    def warm_up(self) -> None:
        """Compile what the first ``run`` would compile. Copies nothing."""
        if self._proven is not None:
            self._proven.warm_up()

    def run(self) -> None:
        """Copy all landings. On a GPU the work is queued on the current stream."""
        self._replay.run()

    def total(self) -> int | None:
        """Return the digest of all placements as they landed; None where the copy takes no digest."""
        return self._proven.total() if self._proven is not None and self._is_all else None


def distinct_copies(placements: Sequence[Placement]) -> list[Copy]:
    """Return a copy of each placement to itself. Placements that are the same bytes (tied tensors under several names) have one copy."""
    found: dict[tuple[object, ...], Copy] = {}
    for placement in placements:
        key = (placement.storage, placement.offset, placement.dtype, placement.region.sizes, placement.strides)
        found.setdefault(key, _self_copy(placement))
    return list(found.values())


def _split(placements: Sequence[Placement]) -> tuple[list[geo.Run], list[Placement]]:
    """What placements touch as runs of bytes of storages, and placements that would be too many of them.

    The latter share no byte with any other.
    """
    distinct = {
        (*_extent(place), place.region.sizes, place.strides): place for place in placements if place.region.numel
    }
    runs: list[geo.Run] = []
    alone: list[Placement] = []
    for group in _overlapping(sorted(distinct.values(), key=_extent)):
        pieces = [geo.touched(place.region.sizes, place.strides) for place in group]
        itemsizes = [itemsize_of(place.dtype) for place in group]
        starts = [(p.starts[0] + place.offset) * n for p, place, n in zip(pieces, group, itemsizes, strict=True)]
        ends = [start + p.length * n for start, p, n in zip(starts, pieces, itemsizes, strict=True)]
        start, end = geo.union(torch.cat(starts), torch.cat(ends))
        if len(group) == 1 and len(start) > MAX_RANGES:
            alone += group
        else:
            where = (group[0].storage,)
            runs += [geo.Run(where, (a,), b - a) for a, b in zip(start.tolist(), end.tolist(), strict=True)]
    return geo.joined(runs), alone


def _bytes(memory: Memory, run: geo.Run) -> torch.Tensor:
    (storage,), (start,) = run.where, run.starts
    return memory.storages[storage][start : start + run.nbytes]


def _extent(place: Placement) -> tuple[int, int, int]:
    return place.storage, place.offset * itemsize_of(place.dtype), place.end_nbytes


def _overlapping(placements: Iterable[Placement]) -> Iterator[list[Placement]]:
    """Placements in order of their extents, in groups of which no two overlap."""
    group: list[Placement] = []
    furthest = 0
    for place in placements:
        storage, start, end = _extent(place)
        if group and (storage != group[0].storage or start >= furthest):
            yield group
            group, furthest = [], 0
        group.append(place)
        furthest = max(furthest, end)
    if group:
        yield group


def _self_copy(placement: Placement) -> Copy:
    return Copy(
        region=placement.region,
        src_storage=placement.storage,
        src_dtype=placement.dtype,
        src_offset=placement.offset,
        src_strides=placement.strides,
        dst_storage=placement.storage,
        dst_dtype=placement.dtype,
        dst_offset=placement.offset,
        dst_strides=placement.strides,
    )
