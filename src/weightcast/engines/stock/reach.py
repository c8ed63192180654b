"""Everything that a model's forward pass can read: parameters, buffers, and tensors that modules keep as plain attributes.

Plain attributes are neither saved nor loaded by torch, and no reload knows of them: a view of a parameter that was taken when the
model was built, or a copy of one that was made once, stays what it was. ``helpers`` is how the names of an engine's own modules begin,
such as ``vllm.``: objects of classes from there are looked into as well, since attention and quantisation keep kernels in such.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

_OWN_DICTS = frozenset({"_parameters", "_buffers", "_modules"})


@dataclass(frozen=True, slots=True)
class Alias:
    """A tensor that was a view of a parameter when the model was built. ``offset`` counts elements from the parameter's first element."""

    place: str
    layer: str
    own: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the same view of another tensor that has the parameter's form."""
        return parameter.detach().as_strided(self.sizes, self.strides, int(parameter.storage_offset()) + self.offset)


def reachable(model: nn.Module, helpers: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a forward pass can read, by the place that keeps them, such as ``layers.0.mixer.conv_weights`` or
    ``attn.impl.sinks``."""
    return {place: value for place, value in _places(model, helpers) if isinstance(value, torch.Tensor)}


def reachable_numbers(model: nn.Module, helpers: str) -> dict[str, float]:
    """Return the floating-point numbers that a forward pass can read, by the place that keeps them. Scales are such numbers, read from
    a tensor once."""
    return {place: value for place, value in _places(model, helpers) if isinstance(value, float)}


def aliases(model: nn.Module, helpers: str) -> list[Alias]:
    """Return the views of parameters that the model keeps beside the parameters. Call this right after the model was built."""
    owners: dict[int, tuple[str, str, torch.Tensor]] = {}
    parameters = set()
    for name, layer in model.named_modules():
        for own, parameter in layer._parameters.items():
            if parameter is not None:
                parameters.add(id(parameter))
                owners.setdefault(parameter.untyped_storage()._cdata, (name, own, parameter))
    found = []
    for place, tensor in reachable(model, helpers).items():
        owner = owners.get(tensor.untyped_storage()._cdata)
        if owner is None or id(tensor) in parameters or tensor.dtype != owner[2].dtype or not tensor.numel():
            continue
        offset = int(tensor.storage_offset()) - int(owner[2].storage_offset())
        found.append(Alias(place, owner[0], owner[1], offset, tuple(tensor.shape), tuple(tensor.stride())))
    return found


def _places(model: nn.Module, helpers: str) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        for own, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            yield prefix + own, tensor
        for own, value in layer.__dict__.items():
            if own not in _OWN_DICTS:
                yield from _inside(prefix + own, value)
                if _is_helper(value, helpers):
                    for inner, part in vars(value).items():
                        yield from _inside(f"{prefix}{own}.{inner}", part)


def _inside(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The value itself, and what a list, a mapping or a function holds of others."""
    yield place, value
    match value:
        case list() | tuple():
            yield from ((f"{place}[{number}]", item) for number, item in enumerate(value))
        case Mapping():
            yield from ((f"{place}[{key}]", item) for key, item in value.items())
        case functools.partial():
            yield from ((f"{place}({number})", item) for number, item in enumerate(value.args))
            yield from ((f"{place}({key})", item) for key, item in value.keywords.items())
        case FunctionType(__closure__=tuple() as cells):
            yield from ((f"{place}({number})", _content(cell)) for number, cell in enumerate(cells))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_helper(value: Any, helpers: str) -> bool:
    kind = type(value)
    return kind.__module__.startswith(helpers) and not isinstance(value, nn.Module) and hasattr(value, "__dict__")
