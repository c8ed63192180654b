"""Absent values: tensors that have a name and a shape here, and their values elsewhere or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from weightcast.errors import InvalidInput, Unsupported

ZERO_HINT = (
    "On every rank publish a stream, which gathers layer by layer:\n"
    "from weightcast.integrations.deepspeed import gathered\n"
    "Publisher(lambda: gathered(module), engines, process_group=torch.distributed.group.WORLD)"
)
META_HINT = (
    "Load the weights first: from_pretrained() without device_map=, or to_empty() and load_state_dict()\n"
    "Weights that stay on disk are published as their checkpoint folder"
)


def refuse_absent(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported naming the first tensor whose values are not here, and how to have them; InvalidInput for what is no tensor."""
    for name, value in tensors.items():
        given: Any = value
        if not isinstance(given, torch.Tensor):
            raise InvalidInput(
                f"{name!r} is no torch tensor, but of type {type(given).__name__}",
                field="source",
                hint="Give tensors only; torch.from_numpy() makes one of an array without a copy",
            )
        if given.is_nested:
            raise Unsupported(f"{name!r} is a nested tensor", hint="Give its tensors one by one: unbind() has them")
        if is_lazy(given):
            raise Unsupported(
                f"{name!r} belongs to a lazy module and has neither shape nor values yet",
                hint="Run the module once before it is published",
            )
        if hasattr(given, "ds_shape"):
            raise Unsupported(
                f"{name!r} is a ZeRO-3 parameter: its values of shape {tuple(given.ds_shape)} are spread over ranks by DeepSpeed",
                hint=ZERO_HINT,
            )
        if given.shape == (0,) and "deepspeed" in sys.modules:
            raise Unsupported(
                f"{name!r} is empty, as DeepSpeed's ZeRO-3 leaves parameters whose values are spread over ranks",
                hint=ZERO_HINT,
            )
        if given.is_meta:
            raise Unsupported(f"{name!r} is on the meta device: it has a shape and no values", hint=META_HINT)
