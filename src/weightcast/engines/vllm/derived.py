"""Views of weights that a model keeps beside them, and what brings them up to date where they no longer share the weights' memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from weightcast.engines.stock.reach import Alias
from weightcast.engines.vllm import api


class Kept(NamedTuple):
    """A tensor that the model reads, and which view of a layer's weight it has to equal."""

    alias: Alias
    tensor: torch.Tensor


def kept_by_layer(found: Sequence[Alias], places: Mapping[str, torch.Tensor]) -> dict[str, list[Kept]]:
    """Return the tensors that a model keeps, by the layer that owns their weight. ``places`` has the tensors that the model can reach."""
    kept: dict[str, list[Kept]] = {}
    for alias in found:
        tensor = places.get(alias.place)
        if tensor is not None and tuple(tensor.shape) == alias.sizes:
            kept.setdefault(alias.layer, []).append(Kept(alias, tensor))
    return kept


@contextmanager
def renewed_by_reload(model: nn.Module, kept: Mapping[str, Sequence[Kept]]) -> Iterator[None]:
    """While inside, a layerwise reload also copies what it loads into these tensors. The layer's weights pass by in the form in which
    they were built, right before they are processed."""
    values: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ExitStack() as stack:
        for name, parts in kept.items():
            stack.enter_context(api.before_processing(model.get_submodule(name), _taking(parts, values)))
        yield
    for tensor, value in values:
        tensor.copy_(value)


def _taking(parts: Sequence[Kept], values: list[tuple[torch.Tensor, torch.Tensor]]) -> api.Look:
    def take(layer: nn.Module) -> None:
        for alias, tensor in parts:
            values.append((tensor, alias.of(getattr(layer, alias.own)).clone()))

    return take
