"""Coverage: whether what trainer ranks hold is all of every tensor, and nothing twice but replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping

from weightcast.errors import PlanMismatch
from weightcast.layout import Layout, Region, overlap
from weightcast.manifest import Manifest

_Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def check_complete(manifest: Manifest, holdings: Mapping[int, Layout], hint: str | None = None) -> None:
    """Raise PlanMismatch naming a tensor of which a part is held by nobody, or that ranks cut in ways that overlap."""
    boxes: dict[str, set[_Box]] = {}
    for layout in holdings.values():
        for placement in layout.placements:
            region = placement.region
            boxes.setdefault(region.name, set()).add((region.offsets, region.sizes))
    known: dict[frozenset[_Box], bool] = {}
    for spec in manifest.tensors:
        found = frozenset(boxes.get(spec.name, ()))
        if found not in known:
            known[found] = _overlap(found)
        if known[found]:
            raise PlanMismatch(f"{spec.name!r} is cut in different ways by different trainer ranks", hint=hint)
        held = sum(math.prod(sizes) for _, sizes in found)
        if held != spec.numel or not found:
            raise PlanMismatch(
                f"trainer ranks hold {held} of {spec.numel} elements of {spec.name!r}",
                hint=hint or "Every rank of the tensor's mesh has to be in the process group",
            )


def _overlap(boxes: frozenset[_Box]) -> bool:
    return overlap(Region(name="", offsets=offsets, sizes=sizes) for offsets, sizes in boxes)
