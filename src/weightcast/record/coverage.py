"""Which bytes placements write: exact, as sorted runs; counts grow with the runs, not with the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightcast.layout import Placement
from weightcast.layout import geometry as geo
from weightcast.manifest.dtypes import itemsize_of

Starts = npt.NDArray[np.int64]


def runs_of(placement: Placement) -> tuple[Starts, int]:
    """Start bytes of the runs that a placement touches in its storage, ascending, and the bytes of each run."""
    itemsize = itemsize_of(placement.dtype)
    rows = geo.touched(placement.region.sizes, placement.strides)
    return np.sort((rows.starts[0].numpy() + placement.offset) * itemsize), rows.length * itemsize


def unwritten_runs(placements: Sequence[Placement], storage: int, nbytes: int) -> list[tuple[int, int]]:
    """The byte ranges (start, end) of a storage that none of the placements touches."""
    pieces = [runs_of(placement) for placement in placements if placement.storage == storage]
    starts = np.concatenate([start for start, _ in pieces]) if pieces else np.empty(0, np.int64)
    ends = np.concatenate([start + length for start, length in pieces]) if pieces else np.empty(0, np.int64)
    low, high = geo.union(torch.from_numpy(starts), torch.from_numpy(ends))
    gaps = zip([0, *high.tolist()], [*low.tolist(), nbytes], strict=True)
    return [(start, end) for start, end in gaps if start < end]


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
