"""Geometry: boxes of elements that lie by strides, and ranges of bytes. Pure integers, without names, types or memory.

A box has a size per dimension, and one tuple of strides for each place in which its elements lie (in memory, in a tensor, at
the other end of a copy). Element order is row-major. Where a dimension has one element its stride means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

Ints = tuple[int, ...]


def contiguous_strides(sizes: Sequence[int]) -> Ints:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after the other, in row-major order."""
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= max(size, 1)
    return True


def offset_of(index: Sequence[int], strides: Sequence[int]) -> int:
    """How far the element at ``index`` lies behind the first one."""
    return sum(at * stride for at, stride in zip(index, strides, strict=True))


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """From the first element to one past the farthest one; 0 for a box without elements."""
    return 0 if 0 in sizes else offset_of([size - 1 for size in sizes], strides) + 1


def replaced(values: Sequence[int], dim: int, value: int) -> Ints:
    """The values with another one for one dimension."""
    return (*values[:dim], value, *values[dim + 1 :])


def collapse(sizes: Sequence[int], *places: Sequence[int]) -> tuple[Ints, tuple[Ints, ...]]:
    """The same box with as few dimensions as can be: neighbours are merged where they continue in all places.

    Returns the sizes, and the strides in each place. The order of elements stays. The box has elements.
    """
    dims: list[tuple[int, Ints]] = []
    for size, *strides in zip(sizes, *places, strict=True):
        if size == 1:
            continue
        if dims and all(outer == size * stride for outer, stride in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, tuple(strides))
        else:
            dims.append((size, tuple(strides)))
    return tuple(size for size, _ in dims), tuple(tuple(dim[1][i] for dim in dims) for i in range(len(places)))


def offsets(sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Where each element lies behind the first one, in row-major order: int64, one dimension."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(sizes, strides, strict=True):
        found = (found[:, None] + torch.arange(size, dtype=torch.int64, device="cpu") * stride).reshape(-1)
    return found


class Rows(NamedTuple):
    """A box as rows of ``length`` elements that lie one after the other in each place; ``starts`` has the rows' first ones."""

    length: int
    starts: tuple[torch.Tensor, ...]


def rows(sizes: Sequence[int], *places: Sequence[int]) -> Rows:
    """The box as rows, as long as can be, in row-major order."""
    if 0 in sizes:
        return Rows(0, (torch.empty(0, dtype=torch.int64, device="cpu"),) * len(places))
    sizes, strides = collapse(sizes, *places)
    length = 1
    if sizes and all(place[-1] == 1 for place in strides):
        length, sizes, strides = sizes[-1], sizes[:-1], tuple(place[:-1] for place in strides)
    return Rows(length, tuple(offsets(sizes, place) for place in strides))


def touched(sizes: Sequence[int], strides: Sequence[int]) -> Rows:
    """The elements that a box touches in one place as rows, whatever their order: dimensions by falling stride."""
    if 0 in sizes:
        return rows(sizes, strides)
    dims = sorted(((stride, size) for size, stride in zip(sizes, strides, strict=True) if stride), reverse=True)
    return rows([size for _, size in dims], [stride for stride, _ in dims])


def union(starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranges from ``starts`` to ``ends`` (one past the last) as sorted ranges that neither overlap nor touch."""
    starts, order = starts.sort(stable=True)
    reached = ends[order].cummax(0).values if len(ends) else ends
    is_first = torch.ones(len(starts), dtype=torch.bool, device="cpu")
    is_first[1:] = starts[1:] > reached[:-1]
    is_last = torch.ones_like(is_first)
    is_last[:-1] = is_first[1:]
    return starts[is_first], reached[is_last]


class Run(NamedTuple):
    """Bytes that lie one after the other in several places. ``where`` has the numbers of their memories, ``starts`` says where in them.

    What follows within ``slack`` bytes may be taken as well: nobody's bytes, alike in all places.
    """

    where: Ints
    starts: Ints
    nbytes: int
    slack: int = 0


def joined(runs: Iterable[Run], *, alignment: int = 1) -> list[Run]:
    """The runs in order of their places, joined where all places continue, also over the slack behind a run.

    Slack is crossed only to a run that starts at multiples of ``alignment`` in all places.
    """
    found: list[Run] = []
    last: Run | None = None
    for run in sorted(runs, key=itemgetter(0, 1)):
        where, starts, nbytes, slack = run
        if last is not None and last.where == where:
            gap = starts[0] - last.starts[0] - last.nbytes
            is_near = gap == 0 or (0 < gap <= last.slack and not any(start % alignment for start in starts))
            if is_near and all(b - a == starts[0] - last.starts[0] for a, b in zip(last.starts, starts, strict=True)):
                found[-1] = last = Run(where, last.starts, last.nbytes + gap + nbytes, slack)
                continue
        found.append(run)
        last = run
    return found
