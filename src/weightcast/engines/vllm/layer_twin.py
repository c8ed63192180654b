"""A twin of one layer: an object of the layer's class with tensors and helpers of its own, in which vLLM's step after loading can run beside
the engine, and the tensors that the layer's forward pass reads in place of the twin's.

A layer's helpers are its quantisation method and the kernels in there. The step after loading writes to the layer and to its helpers, so a
twin has copies of both. The two are then walked side by side: wherever the twin has another tensor than the layer, the layer's tensor is to
get the twin's bytes. Whatever else differs cannot be brought over by bytes.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from weightcast.engines.stock.layers import own_tensors
from weightcast.engines.vllm import api
from weightcast.errors import Unsupported

HELPER_DEPTH = 4
"""A layer has its method, the method a scheme, the scheme a kernel, and the kernel a configuration."""
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum, type, type(None))
_REGISTERED = ("_parameters", "_buffers")

_ADDRESSES = (torch.int64, torch.uint64)
"""Kernels keep addresses in tensors of these types. An address of the twin's memory would outlive that memory."""

Step = tuple[str, Any]
Path = tuple[Step, ...]


@dataclass(frozen=True)
class Pair:
    """A live tensor, and how to reach the tensor of a twin whose bytes it is to get."""

    path: Path
    live: torch.Tensor

    def of(self, twin: nn.Module) -> torch.Tensor:
        """Return the twin's tensor."""
        value: Any = twin
        for kind, key in self.path:
            value = getattr(value, key) if kind == "attribute" else value[key]
        tensor: torch.Tensor = value.detach()
        return tensor

    @property
    def place(self) -> str:
        return _place(self.path)


class LayerTwin:
    """A twin that is used again and again: ``processed`` gives it unprocessed tensors and runs vLLM's step after loading."""

    def __init__(self, layer: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
        """``kept`` are the layer's own tensors that the step after loading finds as they are."""
        copies: dict[int, Any] = {}
        twin: nn.Module = object.__new__(type(layer))
        copies[id(layer)] = twin
        self._helpers: list[tuple[Any, dict[str, Any]]] = []
        attributes = {own: self._copied(value, copies, HELPER_DEPTH) for own, value in layer.__dict__.items()}
        attributes.pop("_already_called_process_weights_after_loading", None)
        self._twin, self._attributes = twin, attributes
        absent = {own: None for group in (layer._parameters, layer._buffers) for own, t in group.items() if t is None}
        self._kept: dict[str, torch.Tensor | None] = {**absent, **kept}
        self._buffers = frozenset(layer._buffers)

    def processed(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """Return the twin, after vLLM processed these tensors in it. The twin of an earlier call is the same object."""
        twin, own = self._twin, {**self._kept, **tensors}
        for helper, attributes in self._helpers:
            helper.__dict__.clear()
            helper.__dict__.update(attributes)
        twin.__dict__.clear()
        twin.__dict__.update(self._attributes)
        twin.__dict__["_parameters"] = {name: t for name, t in own.items() if name not in self._buffers}
        twin.__dict__["_buffers"] = {name: t for name, t in own.items() if name in self._buffers}
        twin.__dict__["_non_persistent_buffers_set"] = set(self._attributes["_non_persistent_buffers_set"])
        method = api.quant_method(twin)
        method.process_weights_after_loading(twin)
        return twin

    def release(self) -> None:
        """Drop the tensors of the last call."""
        self._twin.__dict__.update(_parameters={}, _buffers={})

    def _copied(self, value: Any, copies: dict[int, Any], depth: int) -> Any:
        """The value, or a copy of it where it is a helper; what refers to the layer or to a helper refers to its copy."""
        if id(value) in copies:
            return copies[id(value)]
        if depth and _is_helper(value):
            copy = copies[id(value)] = object.__new__(type(value))
            attributes = {own: self._copied(inner, copies, depth - 1) for own, inner in value.__dict__.items()}
            copy.__dict__.update(attributes)
            self._helpers.append((copy, attributes))
            return copy
        if isinstance(value, MethodType) and id(value.__self__) in copies:
            return MethodType(value.__func__, copies[id(value.__self__)])
        return value


def twin_of(layer: nn.Module) -> LayerTwin:
    """Return a twin of a layer that vLLM has processed."""
    form = api.load_format(layer)
    kept = {own: tensor.detach().clone() for own, tensor in own_tensors(layer).items() if own in api.NOT_RELOADED}
    return LayerTwin(
        layer, {own: _like(tensor, layer._parameters.get(own)) for own, tensor in kept.items() if own not in form}
    )


def _like(tensor: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor:
    return tensor if parameter is None else nn.Parameter(tensor, requires_grad=False)


def pairs_of(layer: nn.Module, twin: nn.Module) -> list[Pair]:
    """Return the tensors in which a processed twin differs from its layer, each memory of the layer once.

    Raises Unsupported, with the place, where the two differ in more than in bytes of tensors of one form.
    """
    found: dict[tuple[int, int], Pair] = {}
    for pair in _differing(layer, twin, (), {}):
        live = pair.live
        if not live.numel():
            continue
        if not is_dense(live):
            raise Unsupported(f"{pair.place} has gaps")
        key = (live.data_ptr(), live.nbytes)
        found.setdefault(key, pair)
    spans = sorted(found)
    for (start, nbytes), (following, _) in itertools.pairwise(spans):
        if start + nbytes > following:
            raise Unsupported(f"{found[start, nbytes].place} shares memory with {found[following, _].place}")
    return list(found.values())


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie without gaps, in whichever order of its dimensions."""
    reached = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != reached:
            return False
        reached *= size
    return True


def _differing(live: Any, twin: Any, path: Path, seen: dict[tuple[int, int], bool]) -> Iterator[Pair]:
    if live is twin or (id(live), id(twin)) in seen:
        return
    seen[id(live), id(twin)] = True
    if isinstance(live, torch.Tensor) and isinstance(twin, torch.Tensor):
        yield from _tensors(live, twin, path)
        return
    if type(live) is not type(twin):
        raise Unsupported(f"{_place(path)} is a {type(twin).__name__} anew, not a {type(live).__name__}")
    match live:
        case _ if isinstance(live, _PLAIN):
            if live != twin:
                raise Unsupported(f"{_place(path)} depends on the weights")
        case list() | tuple():
            yield from _items(dict(enumerate(live)), dict(enumerate(twin)), path, seen)
        case dict():
            yield from _items(live, twin, path, seen)
        case set() | frozenset():
            if live != twin:
                raise Unsupported(f"{_place(path)} depends on the weights")
        case MethodType():
            if live.__func__ is not twin.__func__:
                raise Unsupported(f"{_place(path)} is another function anew")
            yield from _differing(live.__self__, twin.__self__, (*path, ("attribute", "__self__")), seen)
        case functools.partial() if live.func is twin.func:
            yield from _differing(live.args, twin.args, (*path, ("attribute", "args")), seen)
            yield from _differing(live.keywords, twin.keywords, (*path, ("attribute", "keywords")), seen)
        case nn.Module():
            yield from _attributes(live, twin, path, seen)
        case _ if hasattr(live, "__dict__") and not isinstance(live, FunctionType):
            yield from _attributes(live, twin, path, seen)
        case _:
            raise Unsupported(f"{_place(path)} is a {type(live).__name__}, which cannot be looked into")


def _attributes(live: Any, twin: Any, path: Path, seen: dict[tuple[int, int], bool]) -> Iterator[Pair]:
    """Attributes of two objects. What registered as parameter in one may be a plain attribute, None, in the other."""
    if not _is_open(live):
        raise Unsupported(f"{_place(path)} is a {type(live).__name__}, which cannot be looked into")
    sides = []
    for side in (live, twin):
        values = {own: value for own, value in vars(side).items() if own not in _NOT_READ}
        if isinstance(side, nn.Module):
            for group in _REGISTERED:
                values.pop(group, None)
                values |= vars(side)[group]
        sides.append({own: value for own, value in values.items() if value is not None})
    own_first = vars(live).get("_parameters", {})
    for own in sorted(sides[0].keys() | sides[1].keys(), key=lambda own: (own not in own_first, own)):
        where = (*path, ("attribute", own))
        if own not in sides[0] or own not in sides[1]:
            raise Unsupported(f"{_place(where)} is there {'anew' if own in sides[1] else 'no more'}")
        yield from _differing(sides[0][own], sides[1][own], where, seen)


_NOT_READ = frozenset({"_already_called_process_weights_after_loading", "_non_persistent_buffers_set"})


def _items(live: dict[Any, Any], twin: dict[Any, Any], path: Path, seen: dict[tuple[int, int], bool]) -> Iterator[Pair]:
    if live.keys() != twin.keys():
        raise Unsupported(f"{_place(path)} has other items anew")
    for key, value in live.items():
        yield from _differing(value, twin[key], (*path, ("item", key)), seen)


def _tensors(live: torch.Tensor, twin: torch.Tensor, path: Path) -> Iterator[Pair]:
    if live.untyped_storage()._cdata == twin.untyped_storage()._cdata:
        return
    if (live.shape, live.dtype, live.device, live.stride()) != (twin.shape, twin.dtype, twin.device, twin.stride()):
        raise Unsupported(
            f"{_place(path)} is {tuple(live.shape)} {live.dtype} {live.stride()} live, "
            f"{tuple(twin.shape)} {twin.dtype} {twin.stride()} anew"
        )
    if live.dtype in _ADDRESSES:
        raise Unsupported(f"{_place(path)} may be addresses")
    yield Pair(path, live.detach())


def _is_helper(value: Any) -> bool:
    kind = type(value)
    return (
        kind.__module__.startswith(api.PROCESSING)
        and not isinstance(value, (nn.Module, torch.Tensor, enum.Enum, type))
        and kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
        and _is_open(value)
    )


def _is_open(value: Any) -> bool:
    """Whether all that an object is made of is its attributes, and nothing happens at its end."""
    slots = any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    return hasattr(value, "__dict__") and not slots and not hasattr(type(value), "__del__")


@contextmanager
def unchanged(layer: nn.Module) -> Iterator[None]:
    """Raises Unsupported at the end when the layer, or an object that it refers to, has another attribute than before. Attributes are put
    back."""
    before = {id(holder): (holder, dict(vars(holder))) for holder in _holders(layer, HELPER_DEPTH + 2, {})}
    try:
        yield
    finally:
        changed = []
        for holder, attributes in before.values():
            now = vars(holder)
            if now.keys() != attributes.keys() or any(now[own] is not value for own, value in attributes.items()):
                changed.append(type(holder).__name__)
                now.clear()
                now.update(attributes)
    if changed:
        raise Unsupported(f"processing a twin of the layer changes the layer's own {', '.join(changed)}")


def _holders(value: Any, depth: int, seen: dict[int, bool]) -> Iterator[Any]:
    """Objects of vLLM's that can be reached from one, which is among them."""
    is_ours = type(value).__module__.startswith((api.HELPERS, *api.PROCESSING)) or isinstance(value, nn.Module)
    if id(value) in seen or not is_ours or not hasattr(value, "__dict__") or isinstance(value, (type, torch.Tensor)):
        return
    seen[id(value)] = True
    yield value
    if depth:
        for inner in vars(value).values():
            yield from _holders(inner, depth - 1, seen)


def _place(path: Path) -> str:
    return "".join(f".{key}" if kind == "attribute" else f"[{key!r}]" for kind, key in path).removeprefix(".")
