"""Absent values: tensors that have a name and a shape here, and their values elsewhere or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from weightcast.errors import Unsupported

ZERO_HINT = (
    "On every rank publish a mapping with process_group=; its __getitem__ gathers the parameter that it is asked for:\n"
    "with deepspeed.zero.GatheredParameters([parameter]): return parameter.detach().clone()"
)
META_HINT = (
    "Load the weights first: from_pretrained() without device_map=, or to_empty() and load_state_dict()\n"
    "Weights that stay on disk are published as their checkpoint folder"
)


def refuse_absent(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported naming the first tensor whose values are not here, and how to have them."""
    for name, value in tensors.items():
        given: Any = value
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
