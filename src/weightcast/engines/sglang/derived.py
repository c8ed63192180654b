"""Models that compute with more than their parameters, told by name before anything is written."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from weightcast.engines.stock.layers import own_tensors, shown
from weightcast.engines.stock.reach import reachable
from weightcast.errors import Unsupported

HINT = "Serve this model with vLLM or with weightcast serve"
_UNQUANTISED = "Unquant"


def refuse_derived(model: nn.Module) -> None:
    """Raise Unsupported for a model that quantises, packs or derives something of its weights after they were loaded."""
    if hasattr(model, "post_load_weights"):
        raise Unsupported(f"{type(model).__name__} derives weights of others after loading", hint=HINT)
    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        if method != "NoneType" and _UNQUANTISED not in method:
            raise Unsupported(f"{name} is quantised ({method})", hint="Start SGLang without quantization")
        if getattr(layer, "use_intel_amx_backend", False):
            raise Unsupported(f"{name} is packed for AMX", hint="Run SGLang on a GPU, or on a CPU without AMX")
    if error := _own_error(model):
        raise Unsupported(f"SGLang says of this model: {error}", hint=HINT)
    if kept := _kept_beside(model):
        raise Unsupported(f"this model keeps tensors beside its weights: {shown(kept)}", hint=HINT)


def _own_error(model: nn.Module) -> str:
    """SGLang's own reason to refuse an update of this model; empty where it has none."""
    try:
        from sglang.srt.model_executor.model_runner_components import weight_updater
    except ImportError:
        return ""
    check: Any = getattr(weight_updater, "_unsupported_derived_weight_cache_error", None)
    if check is None:
        return ""
    # Older versions look at the process's settings alone.
    return (check(model) if inspect.signature(check).parameters else check()) or ""


def _kept_beside(model: nn.Module) -> list[str]:
    """Places of floating-point tensors that are neither parameters nor buffers, nor share the memory of one."""
    known = {
        tensor.untyped_storage().data_ptr()
        for layer in model.modules()
        for tensor in own_tensors(layer).values()
        if tensor.numel()
    }
    return sorted(
        place
        for place, tensor in reachable(model, "sglang.").items()
        if tensor.is_floating_point()
        and tensor.numel() > 1
        and tensor.device.type != "meta"
        and tensor.untyped_storage().data_ptr() not in known
        and not isinstance(tensor, torch.nn.Parameter)
    )
