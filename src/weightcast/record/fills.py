"""Constants that loaders write next to checkpoint values, such as the zero rows that pad a vocabulary.

A replay of the landings does not write them. That is right where live memory holds them already, as it does when the same
loader filled it before, and where no landing came first that the constant would have overwritten.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from weightcast.layout import Placement
from weightcast.layout.memory import Memory
from weightcast.record.coverage import overlapping, runs_of, unwritten_runs
from weightcast.record.recorder import Fill


def overwritten_names(fill: Fill, landings: Sequence[Placement]) -> set[str]:
    """Names of landings made before the fill that it overwrites."""
    low, high = _span(fill.place)
    found = set()
    for landing in landings[: fill.num_before]:
        if landing.storage == fill.place.storage:
            start, end = _span(landing)
            if start < high and low < end and overlapping([landing, fill.place]):
                found.add(landing.region.name)
    return found


def unkept(fills: Sequence[Fill], written: Sequence[Placement], memory: Memory) -> list[Fill]:
    """Fills of bytes that nothing else writes and that hold another value now."""
    holes = {
        number: unwritten_runs(written, number, memory.storages[number].numel())
        for number in {fill.place.storage for fill in fills}
    }
    return [fill for fill in fills if not _is_kept(fill, holes[fill.place.storage], memory)]


def _is_kept(fill: Fill, holes: list[tuple[int, int]], memory: Memory) -> bool:
    widest = torch.float64 if isinstance(fill.value, float) else torch.int64
    constant = torch.tensor([fill.value], dtype=widest, device="cpu").to(
        memory.view(0, fill.place.dtype, 0, (), ()).dtype
    )
    pattern = constant.view(torch.uint8).to(memory.storages[fill.place.storage].device)
    flat = memory.storages[fill.place.storage]
    for start, end in _common(fill.place, holes):
        cells = flat[start:end]
        if cells.numel() % pattern.numel() or not bool((cells.view(-1, pattern.numel()) == pattern).all()):
            return False
    return True


def _common(place: Placement, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of a placement's runs that lie in holes."""
    starts, length = runs_of(place)
    low, high = _span(place)
    first = max(bisect.bisect_right(holes, (low, 0)) - 1, 0)
    for begin, end in holes[first:]:
        if begin >= high:
            return
        at = int(np.searchsorted(starts, begin - length, side="right"))
        for start in starts[at : int(np.searchsorted(starts, end))]:
            yield max(int(start), begin), min(int(start) + length, end)


def _span(place: Placement) -> tuple[int, int]:
    starts, length = runs_of(place)
    return (int(starts[0]), int(starts[-1]) + length) if len(starts) else (0, 0)
