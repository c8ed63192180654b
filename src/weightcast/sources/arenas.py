"""Arenas: where storages lie when they lie side by side in one. Pure."""

from __future__ import annotations

from weightcast.layout import Layout, Placement, is_padded
from weightcast.manifest import align
from weightcast.manifest.dtypes import itemsize_of


def one_arena(layout: Layout) -> tuple[list[int], Layout]:
    """Where each storage begins in an arena of all of them, and the layout of that arena."""
    starts, end = [], 0
    for nbytes in layout.storage_nbytes:
        starts.append(end)
        end = align(end + nbytes)
    placements = []
    for placement in layout.placements:
        shift = starts[placement.storage] // itemsize_of(placement.dtype)
        placements.append(
            Placement(
                region=placement.region,
                dtype=placement.dtype,
                storage=0,
                offset=placement.offset + shift,
                strides=placement.strides,
            )
        )
    return starts, Layout(placements=tuple(placements), storage_nbytes=(end,))


def is_covered(layout: Layout, arena: Layout) -> bool:
    """Whether nothing but padding lies between published tensors in the arena of a layout: they fill their storages."""
    filled: dict[int, dict[int, int]] = {}
    for placement in layout.placements:
        itemsize = itemsize_of(placement.dtype)
        spans = filled.setdefault(placement.storage, {})
        spans[placement.offset * itemsize] = placement.region.numel * itemsize
    sizes = layout.storage_nbytes
    return all(sum(spans.values()) == sizes[number] for number, spans in filled.items()) and is_padded(arena.placements)
