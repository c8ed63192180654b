"""Coverage: whether what trainer ranks hold is all of every tensor, and nothing twice but replicas."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightcast.errors import PlanMismatch
from weightcast.layout import Region, overlap
from weightcast.layout.columns import Numbers
from weightcast.layout.table import BOX, TENSOR
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Holdings


def check_complete(held: Holdings, hint: str | None = None) -> None:
    """Raise PlanMismatch naming a tensor of which a part is held by nobody, or that ranks cut in ways that overlap."""
    manifest = held.manifest
    boxes = held.numbers[:, held.firsts]
    overlapping = _overlapping(held, boxes)
    numel = np.zeros(len(manifest), np.int64)
    np.add.at(numel, boxes[TENSOR], boxes[BOX + held.dims : BOX + 2 * held.dims].prod(axis=0))
    wrong = np.flatnonzero(numel != manifest.shapes.prod(axis=0)).tolist()
    if overlapping and overlapping[0] <= min(wrong, default=len(manifest)):
        name = manifest.tensors[overlapping[0]].name
        raise PlanMismatch(f"{name!r} is cut in different ways by different trainer ranks", hint=hint)
    if wrong:
        spec = manifest.tensors[wrong[0]]
        raise PlanMismatch(
            f"trainer ranks hold {numel[wrong[0]]} of {spec.numel} elements of {spec.name!r}",
            hint=hint or "Every rank of the tensor's mesh has to be in the process group",
        )


def _overlapping(held: Holdings, boxes: Numbers) -> list[int]:
    """The first tensor with boxes that overlap, if there is one."""
    starts, ends = held.reaches(boxes)
    follows = starts[1:] < ends[:-1]  # where boxes follow each other as ranges, they share no element
    known: dict[bytes, bool] = {}
    for tensor in np.unique(boxes[TENSOR, 1:][follows]).tolist():
        first, last = np.searchsorted(boxes[TENSOR], [tensor, tensor + 1])
        cut = boxes[BOX : BOX + 2 * held.dims, first:last]
        if (form := cut.tobytes()) not in known:
            known[form] = overlap(
                Region(name="", offsets=tuple(row[: held.dims]), sizes=tuple(row[held.dims :]))
                for row in cut.T.tolist()
            )
        if known[form]:
            return [tensor]
    return []


def joined_manifest(manifests: Mapping[int, Manifest]) -> Manifest:
    """Rank 0's tensors and whatever only others have, in order of rank; PlanMismatch where two ranks differ in a tensor."""
    specs: dict[str, tuple[int, TensorSpec]] = {}
    for rank, manifest in sorted(manifests.items()):
        for spec in manifest.tensors:
            first, known = specs.setdefault(spec.name, (rank, spec))
            if known != spec:
                raise PlanMismatch(
                    f"{spec.name!r} is {known.dtype} {known.shape} on trainer rank {first}, "
                    f"{spec.dtype} {spec.shape} on rank {rank}",
                    hint="A plain tensor counts as whole: give shards as DTensors",
                )
    return Manifest.of(spec for _, spec in specs.values())
