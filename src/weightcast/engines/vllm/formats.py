"""Which layers of a vLLM model can be landed in, and a model whose loader can be recorded.

A layer is landable when what its loader fills is what its forward pass reads: every parameter looks as it was built, no step
after loading packed or quantised it, no other layer keeps something that was computed from it. On CPU so are plain layers that
are only packed after loading (see mirror.py). All others go through vLLM's layerwise reload.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from weightcast.engines.stock.layers import LayerTensors, own_tensors
from weightcast.engines.vllm import api


def classify(model: nn.Module, device: torch.device) -> dict[str, bool]:
    """Say of each layer that has tensors of its own whether it is landable, by module name."""
    derived = _names_below_deriving(model)
    landable = {
        name: name not in derived and _is_landable(layer, device)
        for name, layer in model.named_modules()
        if api.load_format(layer) or own_tensors(layer)
    }
    _spread_over_shared(model, landable)
    return landable


def quantised(model: nn.Module, landable: Mapping[str, bool]) -> list[str]:
    """Return the names of layers that are not landable because vLLM processes what was loaded, and that share no parameter."""
    owners: dict[int, int] = {}
    for layer in model.modules():
        for tensor in _parameters(layer):
            owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    derived = _names_below_deriving(model)
    return [
        name
        for name, layer in model.named_modules()
        if name in landable
        and not landable[name]
        and name not in derived
        and api.load_format(layer)
        and api.quantises(api.quant_method(layer))
        and all(owners[id(tensor)] == 1 for tensor in _parameters(layer))
    ]


def tied_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the embeddings that share their weight with another layer. A reload packs the shared weight for one of the layers only."""
    owners: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.numel() and api.is_embedding(api.quant_method(layer)):
            owners.setdefault(id(weight), []).append(layer)
    return [layer for layers in owners.values() if len(layers) > 1 for layer in layers]


def _names_below_deriving(model: nn.Module) -> set[str]:
    found: set[str] = set()
    for name, layer in model.named_modules():
        if name and api.derives_weights(layer):
            below = {id(inner) for inner in layer.modules()}
            found |= {other for other, inner in model.named_modules() if id(inner) in below}
    return found


def _is_landable(layer: nn.Module, device: torch.device) -> bool:
    method = api.quant_method(layer)
    if method is None:
        return not hasattr(layer, "process_weights_after_loading") and _looks_as_built(layer)
    if api.is_packed_for_cpu(method, device):
        return True
    is_read_as_loaded = api.keeps_load_format(method) or api.is_accelerator_unquantized(method, device)
    return is_read_as_loaded and _looks_as_built(layer)


def _looks_as_built(layer: nn.Module) -> bool:
    live = own_tensors(layer)
    return all(
        name in live
        and (live[name].shape, live[name].dtype, live[name].stride()) == (meta.shape, meta.dtype, meta.stride())
        for name, meta in api.load_format(layer).items()
    )


def _spread_over_shared(model: nn.Module, landable: dict[str, bool]) -> None:
    """Layers that share a parameter are landable only when all of them are."""
    layers = dict(model.named_modules())
    changed = True
    while changed:
        loaded = {id(t) for name, lands in landable.items() if not lands for t in _parameters(layers[name])}
        touched = [
            name for name, lands in landable.items() if lands and loaded & set(map(id, _parameters(layers[name])))
        ]
        changed = bool(touched)
        landable.update(dict.fromkeys(touched, False))


def _parameters(layer: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in layer._parameters.values() if tensor is not None and tensor.numel()]


@contextmanager
def in_load_format(
    model: nn.Module, landable: dict[str, bool], processed: Container[str] = (), *, live: bool
) -> Iterator[list[LayerTensors]]:
    """While inside, the model is as its loader wants it. All layers have stand-ins for their tensors; with ``live`` only the layers
    that are not landable. Stand-ins must not be computed with. ``processed`` are layers that can be landed in beside the live ones.

    Live tensors are back in their places afterwards, and nothing of theirs was touched.
    """
    borrowed = _Borrowed()
    try:
        yield [
            borrowed.layer(name, layer, landable[name] or name in processed, as_it_is=live and landable[name])
            for name, layer in model.named_modules()
            if name in landable
        ]
    finally:
        borrowed.give_back()


class _Borrowed:
    """Layers whose tensors are replaced by stand-ins for a while."""

    def __init__(self) -> None:
        self._saved: list[tuple[nn.Module, dict[str, nn.Parameter | None], dict[str, torch.Tensor | None]]] = []
        self._stand_ins: dict[int, torch.Tensor] = {}
        """By the live tensor that a stand-in is for: layers that share a tensor share its stand-in."""

    def layer(self, name: str, layer: nn.Module, landable: bool, *, as_it_is: bool) -> LayerTensors:
        """A layer's tensors in load format: those that it has, or stand-ins that are put in their places."""
        self._saved.append((layer, dict(layer._parameters), dict(layer._buffers)))
        tensors = own_tensors(layer)
        if not as_it_is:
            tensors = self._stand_ins_for(layer)
            _install(layer, tensors)
        found = LayerTensors(name, layer, landable)
        may_lack = api.derives_weights(layer) or api.has_defaults(layer)
        for own, tensor in tensors.items():
            is_required = isinstance(tensor, nn.Parameter) and not may_lack
            (found.required if is_required else found.optional)[own] = tensor
        return found

    def give_back(self) -> None:
        """Put all tensors back in their places."""
        for layer, parameters, buffers in reversed(self._saved):
            layer._parameters.clear()
            layer._parameters.update(parameters)
            layer._buffers.clear()
            layer._buffers.update(buffers)

    def _stand_ins_for(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        built, live = api.load_format(layer), own_tensors(layer)
        # Some names (biases) are not in the metadata: their live tensors have the form that the loader wants.
        forms = {**{n: t for n, t in live.items() if n not in built and n in _UNLISTED}, **built}
        found = {}
        for own, form in forms.items():
            key = id(live[own]) if own in live and live[own].numel() else id(form)
            if key not in self._stand_ins:
                self._stand_ins[key] = api.stand_in(form, layer)
            found[own] = self._stand_ins[key]
        return found


_UNLISTED = frozenset({"bias", "e_score_correction_bias"})


def _install(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    buffers = {name: t for name, t in tensors.items() if name not in parameters}
    layer._parameters.clear()
    layer._parameters.update(parameters)
    kept = {name: t for name, t in layer._buffers.items() if name not in tensors}
    layer._buffers.clear()
    layer._buffers.update({**kept, **buffers})
