"""Digests of live weights by checkpoint tensor: what ``weightcast verify`` compares, fused tensors and casts included."""

from __future__ import annotations

from weightcast.digest import LayoutDigest
from weightcast.engines.base import TensorDigest
from weightcast.layout import Layout, Placement
from weightcast.manifest import Manifest, TensorSpec
from weightcast.memory import Memory
from weightcast.record import Recording


def tensor_digests(manifest: Manifest, recording: Recording, memory: Memory) -> dict[str, TensorDigest]:
    """One entry for each tensor that the model uses. Its digest is that of a tensor by itself, counted from position 0, in
    the type that it has here; ``reason`` says why there is none."""
    landings: dict[str, list[Placement]] = {}
    for placement in recording.layout.placements:
        landings.setdefault(placement.region.name, []).append(placement)
    sizes = tuple(storage.numel() for storage in memory.storages)
    found = {name: _digest(manifest[name], placed, sizes, memory) for name, placed in landings.items()}
    for name, reason in recording.reasons.items():
        found[name] = TensorDigest(reason=f"goes through the loader: {reason}")
    return {spec.name: found[spec.name] for spec in manifest.tensors if spec.name in found}


def _digest(spec: TensorSpec, placed: list[Placement], sizes: tuple[int, ...], memory: Memory) -> TensorDigest:
    dtypes = sorted({placement.dtype for placement in placed})
    if len(dtypes) > 1:
        return TensorDigest(reason=f"lies here in several types: {', '.join(dtypes)}")
    if sum(placement.region.numel for placement in placed) != spec.numel:
        return TensorDigest(reason="lies here in part, or more than once")
    alone = Manifest.of([TensorSpec(name=spec.name, dtype=dtypes[0], shape=spec.shape)])
    digest = LayoutDigest(alone, Layout(placements=tuple(placed), storage_nbytes=sizes)).of(memory)
    return TensorDigest(dtype=dtypes[0], digest=f"{digest:016x}")
