"""What workers hold of checkpoint tensors: digests of live regions, and how those of several workers make a tensor's. Pure.

Digests of disjoint regions add (see digest): workers that hold slices of a tensor prove all of it together, and workers that hold
the same region have to hold the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from weightcast.content.layout_digest import LayoutDigest
from weightcast.digest.formula import combine
from weightcast.layout import Layout, Placement, Region, overlap
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec


class LiveRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a tensor, and the hex digest of its live values in the type that they have there, counted from where the tensor
    begins."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    digest: str


class LiveTensor(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker holds of a tensor; no regions and the ``reason`` when that cannot be told."""

    regions: tuple[LiveRegion, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """What an engine holds of one checkpoint tensor: the digest of its values in the type that they have there (see digest).

    An empty digest comes with the ``reason`` why the live values cannot be told apart.
    """

    dtype: str = ""
    digest: str = ""
    reason: str = ""


def live_tensors(
    manifest: Manifest, placements: Sequence[Placement], reasons: Mapping[str, str], memory: Memory
) -> dict[str, LiveTensor]:
    """Digest where the placements say that checkpoint tensors lie in live memory; ``reasons`` are for tensors whose place nobody
    knows. Tensors that are in neither are not used here, and left out."""
    placed: dict[str, list[Placement]] = {}
    for placement in placements:
        placed.setdefault(placement.region.name, []).append(placement)
    sizes = tuple(storage.numel() for storage in memory.storages)
    found = {
        name: LiveTensor(regions=tuple(_digested(manifest[name], placement, sizes, memory) for placement in here))
        for name, here in placed.items()
        if name not in reasons
    }
    return found | {name: LiveTensor(reason=reason) for name, reason in reasons.items()}


def _digested(spec: TensorSpec, placement: Placement, sizes: tuple[int, ...], memory: Memory) -> LiveRegion:
    alone = Manifest.of([TensorSpec(name=spec.name, dtype=placement.dtype, shape=spec.shape)])
    digest = LayoutDigest(alone, Layout(placements=(placement,), storage_nbytes=sizes)).of(memory)
    region = placement.region
    return LiveRegion(offsets=region.offsets, sizes=region.sizes, dtype=placement.dtype, digest=f"{digest:016x}")


def tensor_digests(manifest: Manifest, workers: Iterable[Mapping[str, LiveTensor]]) -> dict[str, TensorDigest]:
    """One entry for each tensor that a worker uses, in the manifest's order. Its digest is that of the tensor by itself, counted
    from position 0. Parts of a model that the manifest has no tensors of come behind, with the reason that a worker gave."""
    held: dict[str, list[LiveTensor]] = {}
    for worker in workers:
        for name, tensor in worker.items():
            held.setdefault(name, []).append(tensor)
    found = {spec.name: _joined(spec, held[spec.name]) for spec in manifest.tensors if spec.name in held}
    return found | {name: TensorDigest(reason=some[0].reason) for name, some in held.items() if name not in found}


def _joined(spec: TensorSpec, held: Sequence[LiveTensor]) -> TensorDigest:
    reason = next((tensor.reason for tensor in held if tensor.reason), "")
    if reason:
        return TensorDigest(reason=reason)
    regions = {region for tensor in held for region in tensor.regions}
    dtypes = sorted({region.dtype for region in regions})
    if len(dtypes) > 1:
        return TensorDigest(reason=f"lies here in several types: {', '.join(dtypes)}")
    boxes = {Region(name=spec.name, offsets=region.offsets, sizes=region.sizes) for region in regions}
    if len(boxes) < len(regions):
        return TensorDigest(reason="lies here more than once, with different values")
    if overlap(boxes) or not boxes or sum(box.numel for box in boxes) != spec.numel:
        return TensorDigest(reason="lies here in part, or in pieces that overlap")
    return TensorDigest(dtype=dtypes[0], digest=f"{combine(int(region.digest, 16) for region in regions):016x}")
