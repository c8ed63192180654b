"""Strided views as boxes: which boxes of a row-major tensor a view walks, and where each lands. Pure integers.

A view is an element offset and a list of walks. A box is a range per dimension of the tensor; inside one box the target
address is affine in the tensor's own indices, which is what a Placement can say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from weightcast.layout import geometry as geo

MAX_BOXES = 4096
"""Views that fall into more boxes than this are slower to copy than to load; see TooManyBoxes."""


class TooManyBoxes(ValueError):
    """The view cannot be described by at most MAX_BOXES boxes."""


class Walk(NamedTuple):
    """One view dimension: ``size`` steps of ``stride`` in the tensor and of ``target`` at the target (elements)."""

    size: int
    stride: int
    target: int


class Box(NamedTuple):
    """A box of the tensor and where it lies at the target: element offset and a stride per tensor dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    target: int
    target_strides: tuple[int, ...]


def boxes_of(shape: tuple[int, ...], offset: int, walks: list[Walk], target: int) -> list[Box]:
    """The boxes of a row-major tensor of ``shape`` that a view walks; together they hold each of its elements once.

    Splits, merges and permutations of dimensions are exact. Raises TooManyBoxes for views such as long step slices, and for
    views that repeat elements (stride 0).
    """
    if any(walk.size == 0 for walk in walks):
        return []
    if any(walk.size > 1 and walk.stride == 0 for walk in walks):
        raise TooManyBoxes("the view repeats elements")
    found: list[Box] = []
    for box in _boxes(_Grid(shape), offset, _joined(walks), target):
        if len(found) == MAX_BOXES:
            raise TooManyBoxes(f"the view falls into more than {MAX_BOXES} boxes")
        found.append(box)
    return found


class _Grid:
    """A row-major tensor's dimensions larger than one, outermost first, and its coordinates."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.strides = geo.contiguous_strides(shape)
        self.dims = [d for d, size in enumerate(shape) if size > 1]

    def dim_of(self, stride: int) -> int | None:
        """The dimension that a step of ``stride`` moves along by exactly one index."""
        return next((d for d in self.dims if self.strides[d] == stride), None)

    def coordinates(self, offset: int) -> list[int]:
        return [offset // stride % size for stride, size in zip(self.strides, self.shape, strict=True)]


def _joined(walks: list[Walk]) -> list[Walk]:
    """Walks by falling stride, without single steps, joined where tensor and target both continue."""
    falling = sorted(walks, key=lambda walk: walk.stride, reverse=True)
    sizes, places = geo.collapse(*([walk[at] for walk in falling] for at in range(3)))
    return [Walk(*walk) for walk in zip(sizes, *places, strict=True)]


def _boxes(grid: _Grid, offset: int, walks: list[Walk], target: int) -> Iterator[Box]:
    start = grid.coordinates(offset)
    sizes, target_strides = [1] * len(grid.shape), [0] * len(grid.shape)
    for i, walk in enumerate(walks):
        others = walks[:i] + walks[i + 1 :]
        dim = grid.dim_of(walk.stride)
        if dim is None or sizes[dim] > 1:
            for step in range(walk.size):
                yield from _boxes(grid, offset + step * walk.stride, others, target + step * walk.target)
            return
        room = grid.shape[dim] - start[dim]
        if walk.size > room:
            yield from _over_the_edge(grid, offset, walk, others, target, dim, room)
            return
        sizes[dim], target_strides[dim] = walk.size, walk.target
    yield Box(tuple(start), tuple(sizes), target, tuple(target_strides))


def _over_the_edge(
    grid: _Grid, offset: int, walk: Walk, others: list[Walk], target: int, dim: int, room: int
) -> Iterator[Box]:
    """A walk that runs past the end of ``dim`` into the next outer dimension: whole rows as two walks, ragged ends cut off."""
    row = grid.shape[dim]
    head = walk.size % row if room == row else room
    if head == 0:
        outer = Walk(walk.size // row, walk.stride * row, walk.target * row)
        yield from _boxes(grid, offset, [outer, Walk(row, walk.stride, walk.target), *others], target)
        return
    if room == row:
        head = walk.size - head
    yield from _boxes(grid, offset, [walk._replace(size=head), *others], target)
    rest = walk._replace(size=walk.size - head)
    yield from _boxes(grid, offset + head * walk.stride, [rest, *others], target + head * walk.target)
