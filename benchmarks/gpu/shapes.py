"""Weight lists of real models, and where a trainer and a fused engine keep them."""

from __future__ import annotations

from dataclasses import dataclass

from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.manifest import Manifest, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's dimensions; ``num_experts`` 0 is a dense model."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    tied: bool
    num_experts: int = 0
    head_dim: int = 128
    vocab: int = 151_936


SHAPES = {
    "0.6B": Shape(layers=28, hidden=1024, inter=3072, heads=16, kv_heads=8, tied=True),
    "8B": Shape(layers=36, hidden=4096, inter=12_288, heads=32, kv_heads=8, tied=False),
    "MoE": Shape(layers=24, hidden=2048, inter=768, heads=32, kv_heads=4, tied=False, num_experts=128),
}


def groups(shape: Shape) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Checkpoint tensors (name, shape), grouped by the engine parameter that they are fused into."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    result: list[list[tuple[str, tuple[int, ...]]]] = [[("embed", (shape.vocab, h))]]
    for layer in range(shape.layers):
        at = f"layers.{layer}."
        result.append([(at + "q", (q, h)), (at + "k", (kv, h)), (at + "v", (kv, h))])
        result.append([(at + "o", (h, q))])
        result += [[(at + name, (size,))] for name, size in (("qn", shape.head_dim), ("kn", shape.head_dim))]
        result += [[(at + name, (h,))] for name in ("ln1", "ln2")]
        if not shape.num_experts:
            result.append([(at + "gate", (shape.inter, h)), (at + "up", (shape.inter, h))])
            result.append([(at + "down", (h, shape.inter))])
            continue
        result.append([(at + "router", (shape.num_experts, h))])
        experts = [f"{at}experts.{e}." for e in range(shape.num_experts)]
        result.append([(e + part, (shape.inter, h)) for e in experts for part in ("gate", "up")])
        result.append([(e + "down", (h, shape.inter)) for e in experts])
    result.append([("norm", (h,))])
    if not shape.tied:
        result.append([("head", (shape.vocab, h))])
    return result


def layouts(shape: Shape, src_dtype: str = "bfloat16") -> tuple[Manifest, Layout, Layout]:
    """The manifest, a trainer with one storage per tensor, an engine with one storage per fused parameter."""
    specs, held, wanted, held_nbytes, wanted_nbytes = [], [], [], [], []
    itemsize = 4 if src_dtype == "float32" else 2
    for number, group in enumerate(groups(shape)):
        end = 0
        for name, sizes in group:
            spec = TensorSpec(name=name, dtype="bfloat16", shape=sizes)
            specs.append(spec)
            place = {"region": Region.whole(spec), "strides": contiguous_strides(sizes)}
            held.append(Placement(dtype=src_dtype, storage=len(held), offset=0, **place))  # type: ignore[arg-type]
            held_nbytes.append(spec.numel * itemsize)
            wanted.append(Placement(dtype="bfloat16", storage=number, offset=end, **place))  # type: ignore[arg-type]
            end += spec.numel
        wanted_nbytes.append(end * 2)
    return (
        Manifest.of(specs),
        Layout(placements=tuple(held), storage_nbytes=tuple(held_nbytes)),
        Layout(placements=tuple(wanted), storage_nbytes=tuple(wanted_nbytes)),
    )
