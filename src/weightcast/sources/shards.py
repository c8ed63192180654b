"""Shards: the part of a distributed tensor that this rank holds, as a region of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from weightcast.errors import Unsupported

FULL_TENSOR_HINT = "Publish full tensors: a state dict with full_tensor()"


class Part(NamedTuple):
    """The values that one rank holds of a tensor, the place of these values in the tensor, and the shape of the whole tensor."""

    values: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def is_distributed(value: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor. Imports nothing."""
    return type(value).__name__ == "DTensor" or hasattr(value, "placements")


def check_dense(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported for a tensor that has no strided values of its own."""
    for name, value in tensors.items():
        is_dense = value.layout is torch.strided and not (value.is_nested or value.is_quantized)
        if not is_dense or value.is_meta or type(value).__name__ == "FakeTensor":
            raise Unsupported(f"{name!r} is not a plain dense tensor ({_kind_of(value)})")


def _kind_of(value: torch.Tensor) -> str:
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return type(value).__name__
    kind = "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
    return f"{kind}, {value.device}"


def has_other_bytes(value: torch.Tensor) -> bool:
    """Whether a tensor's values are not what lies in its memory: torch conjugates, negates or makes them up whenever they are read."""
    return value.is_conj() or value.is_neg() or torch._is_zerotensor(value)


def local_of(value: torch.Tensor) -> torch.Tensor:
    """Return the values that this process holds of a tensor. They share the tensor's memory."""
    if not is_distributed(value):
        return value
    distributed: Any = value.detach()
    local: torch.Tensor = distributed.to_local()
    return local


shard_of = attrgetter("_local_tensor")
"""``local_of`` a DTensor as a function without Python in it, for checks of thousands in each round; no autograd, no copies."""


def part_of(name: str, value: torch.Tensor) -> Part:
    """Return what this rank holds of a tensor: all of a plain tensor, this rank's shard of a DTensor, and nothing of a DTensor whose
    mesh does not include this rank.

    Raises Unsupported for placements whose shard is not one box of the tensor, or does not lie where DTensor says, and for values that are
    not what lies in the tensor's memory.
    """
    if not is_distributed(value):
        _refuse_other_bytes(name, value)
        return Part(value.detach(), (0,) * value.dim(), tuple(value.shape))
    # The functions that DTensor itself shards with: nothing else knows the uneven ones.
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    distributed: Any = value
    for placement in distributed.placements:
        if type(placement) not in (Replicate, Shard):
            raise Unsupported(f"{name!r} is a DTensor with placement {placement!r}", hint=FULL_TENSOR_HINT)
    local, shape = local_of(value), tuple(value.shape)
    _refuse_other_bytes(name, local)
    if distributed.device_mesh.get_coordinate() is None:
        return Part(local, (0,) * len(shape), shape)
    sizes, offsets = compute_local_shape_and_global_offset(value.shape, distributed.device_mesh, distributed.placements)
    if tuple(local.shape) != tuple(sizes):
        raise Unsupported(
            f"{name!r}: the local shard is {tuple(local.shape)}, its placements {distributed.placements} make it {tuple(sizes)}",
            hint=FULL_TENSOR_HINT,
        )
    return Part(local, tuple(offsets), shape)


def _refuse_other_bytes(name: str, value: torch.Tensor) -> None:
    if has_other_bytes(value):
        raise Unsupported(
            f"{name!r} is a view whose values torch makes whenever they are read (conj(), the imaginary part of it, a tensor of zeros)",
            hint="Give it memory that holds its values: resolve_conj(), resolve_neg() or clone(); or publish a state dict, which is copied",
        )
