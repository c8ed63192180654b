"""Quantised: linear layers of bitsandbytes, whose weights are published dequantised. Nothing is imported unless such a layer is there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from weightcast.errors import Unsupported
from weightcast.sources.shards import is_distributed

_KINDS = ("Params4bit", "Int8Params")


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer has a weight that bitsandbytes has packed."""
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ not in _KINDS:
        return False
    return weight.quant_state is not None if type(weight).__name__ == "Params4bit" else weight.dtype == torch.int8


def refuse_unknown(module: nn.Module, name: str) -> None:
    """Raise Unsupported for a layer whose weight is packed in a way that is not undone here."""
    if not isinstance(module, nn.Linear):
        raise Unsupported(
            f"{name!r} is a quantised {type(module).__name__}",
            hint="Load the base model with its linear layers quantised only, or not at all",
        )
    if is_distributed(module._parameters["weight"]):  # type: ignore[arg-type]
        raise Unsupported(
            f"{name!r} is quantised and sharded",
            hint="Shard a base model that is not quantised, or have every rank hold the quantised one whole",
        )


@torch.no_grad()
def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight of a layer as bitsandbytes computes with it, in memory of its own: 4 bits in the type that was quantised, 8 bits in
    float32."""
    from bitsandbytes import functional

    layer: Any = module
    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        found: torch.Tensor = functional.dequantize_4bit(*_unpacked(weight.data, weight.quant_state))
    else:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        found = functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return found


def _unpacked(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """A weight as it was before a forward pass on a CPU packed it for the processor, which rounds the scales and stays so."""
    from bitsandbytes import functional

    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    state = copy.copy(state)  # unpacking writes into the state that it is given
    state.original_nested = False  # or the scales are quantised once more
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return data, state
