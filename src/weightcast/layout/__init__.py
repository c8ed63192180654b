"""Layouts: which regions of checkpoint tensors a process holds or wants, and where they lie in its memory."""

from weightcast.layout.layout import (
    TIMES_A_TENSOR,
    Layout,
    Placement,
    Region,
    contiguous_strides,
    image_layout,
    is_padded,
    most_placements,
    overlap,
)

__all__ = [
    "TIMES_A_TENSOR",
    "Layout",
    "Placement",
    "Region",
    "contiguous_strides",
    "image_layout",
    "is_padded",
    "most_placements",
    "overlap",
]
