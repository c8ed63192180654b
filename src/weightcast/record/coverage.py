"""Which bytes placements write: exact, as sorted runs; counts grow with the runs, not with the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightcast.dtypes import itemsize_of
from weightcast.layout import Placement

Starts = npt.NDArray[np.int64]


def runs_of(placement: Placement) -> tuple[Starts, int]:
    """Start bytes of the runs that a placement touches in its storage, ascending, and the bytes of each run."""
    itemsize = itemsize_of(placement.dtype)
    if placement.region.numel == 0:
        return np.empty(0, np.int64), 0
    walks = [(s, n) for n, s in zip(placement.region.sizes, placement.strides, strict=True) if n > 1]
    length = 1
    while walks and min(walks)[0] == length:
        walk = min(walks)
        walks.remove(walk)
        length *= walk[1]
    starts = np.array([placement.offset * itemsize], np.int64)
    for stride, size in sorted(walks, reverse=True):
        steps = np.arange(size, dtype=np.int64) * (stride * itemsize)
        starts = (starts[:, None] + steps[None, :]).reshape(-1)
    return starts, length * itemsize


def unwritten_runs(placements: Sequence[Placement], storage: int, nbytes: int) -> list[tuple[int, int]]:
    """The byte ranges (start, end) of a storage that none of the placements touches."""
    pieces = [runs_of(placement) for placement in placements if placement.storage == storage]
    starts = np.concatenate([start for start, _ in pieces]) if pieces else np.empty(0, np.int64)
    ends = np.concatenate([start + length for start, length in pieces]) if pieces else np.empty(0, np.int64)
    order = np.argsort(starts, kind="stable")
    starts = np.append(starts[order], nbytes)
    reached = np.concatenate(([0], np.maximum.accumulate(ends[order])))
    gaps = np.flatnonzero(starts > reached)
    return [(int(reached[gap]), int(starts[gap])) for gap in gaps]


def overlapping(placements: Sequence[Placement]) -> list[tuple[int, int]]:
    """Pairs of placements (by number, ascending) that write a common byte.

    A placement that meets several others in one place is paired with the one that reaches furthest; so every placement that
    overlaps any other is in at least one pair.
    """
    pairs: set[tuple[int, int]] = set()
    for storage in {placement.storage for placement in placements}:
        numbers = [i for i, placement in enumerate(placements) if placement.storage == storage]
        pairs |= _overlaps([(i, *runs_of(placements[i])) for i in numbers])
    return sorted(pairs)


def _overlaps(pieces: list[tuple[int, Starts, int]]) -> set[tuple[int, int]]:
    owners = np.concatenate([np.full(len(starts), number) for number, starts, _ in pieces])
    ends = np.concatenate([starts + length for _, starts, length in pieces])
    starts = np.concatenate([starts for _, starts, _ in pieces])
    order = np.lexsort((owners, starts))
    owners, starts, ends = owners[order], starts[order], ends[order]
    furthest = np.maximum.accumulate(ends)
    meets = np.flatnonzero(starts[1:] < furthest[:-1]) + 1
    pairs: set[tuple[int, int]] = set()
    for at in meets:
        before = int(np.searchsorted(furthest, furthest[at - 1]))
        pair = sorted((int(owners[before]), int(owners[at])))
        if pair[0] != pair[1]:
            pairs.add((pair[0], pair[1]))
    return pairs
