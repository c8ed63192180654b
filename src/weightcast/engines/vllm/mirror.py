"""Mirror: the load format of a CPU worker's layers in memory that can be landed in, and the way from there to live kernels.

On CPU vLLM packs weights for its kernels and drops what was loaded. The mirror keeps what was loaded: landings fill it, also
with a tensor-parallel worker's slices only, and digests are taken there. Packing takes most of an update's time, so it is done
from a mirror in the background, into stand-ins for the layers; going live is then an exchange of what the stand-ins hold.

Two properties are load-bearing. Parameter objects stay what they are (models and compiled code hold them, tied layers share
them): only their data are exchanged. And what was live is kept with its mirror, so that going back is the same exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch
from torch import nn

from weightcast.engines.stock.layers import LayerTensors, own_tensors
from weightcast.engines.vllm import api
from weightcast.errors import StateError
from weightcast.layout import Placement, is_padded
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, align
from weightcast.manifest.dtypes import itemsize_of, name_of


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of a layer, in load format, lies in the mirror; ``offset`` counts elements."""

    dtype: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slots:
    """A mirror's form: the tensors of each layer, how large it is, and whether its landings are padded (see layout.is_padded)."""

    layers: dict[str, dict[str, Slot]]
    nbytes: int
    is_padded: bool = False

    def new_memory(self) -> Memory:
        """A mirror's memory, zero like the padding that no checkpoint fills."""
        return Memory(
            [torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu")] if self.nbytes else [], is_arena=self.is_padded
        )


@dataclass(slots=True)
class Kernels:
    """What a layer computes with: its parameters' and buffers' data, and what its step after loading left on it."""

    data: dict[str, torch.Tensor] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


class Mirror:
    """The layers that take their weights from a mirror. ``live`` is the mirror that the layers compute with now."""

    def __init__(self, layers: Mapping[str, nn.Module], slots: Mapping[str, Mapping[str, Slot]], live: Memory) -> None:
        self._layers = dict(layers)
        self._slots = slots
        self._ready: dict[int, dict[str, Kernels]] = {}
        self.live = live
        self.is_filled = False
        """Whether something landed here, and layers compute with it."""

    def derive(self, memory: Memory) -> None:
        """Pack what lies in another mirror, for ``go_live``. May run while the model computes."""
        self._ready.pop(self._address(memory), None)
        self._ready[self._address(memory)] = {name: self._packed(name, memory) for name in self._layers}

    def go_live(self, memory: Memory) -> None:
        """Compute from now on with what ``derive`` packed out of ``memory``. What was live before stays ready to come back."""
        ready = self._ready.pop(self._address(memory), None)
        if ready is None and self._layers:
            raise StateError("this mirror was not prepared")
        before = {name: _exchange(self._layers[name], kernels) for name, kernels in (ready or {}).items()}
        self._ready[self._address(self.live)] = before
        self.live, self.is_filled = memory, True

    def refresh(self) -> None:
        """Pack the live mirror layer by layer, after its bytes were written in place. What was live before is gone."""
        for name in self._layers:
            _exchange(self._layers[name], self._packed(name, self.live))
        self.is_filled = True

    def _packed(self, name: str, memory: Memory) -> Kernels:
        layer, views = self._layers[name], self._views(name, memory)
        method = api.quant_method(layer)
        if method is None or api.keeps_load_format(method):
            # The model reads these as they were loaded, maybe through references of its own: values, no exchange.
            return Kernels(data={own: view.clone() for own, view in views.items()})
        stand_in = _stand_in(layer, views)
        with torch.no_grad():
            method.process_weights_after_loading(stand_in)
        known = layer.__dict__
        attributes = {
            attribute: value
            for attribute, value in stand_in.__dict__.items()
            if attribute not in _OWN_DICTS and (attribute not in known or known[attribute] is not value)
        }
        tensors = own_tensors(stand_in)
        return Kernels(data={own: tensors[own].data for own in views if own in tensors}, attributes=attributes)

    def forget(self) -> None:
        """Free everything that is packed and not live."""
        self._ready.clear()

    def __contains__(self, layer: object) -> bool:
        return any(layer is own for own in self._layers.values())

    def views(self, name: str) -> dict[str, torch.Tensor]:
        """Return a layer's tensors in the live mirror; none before something landed there."""
        return self._views(name, self.live) if self.is_filled and name in self._layers else {}

    def _views(self, name: str, memory: Memory) -> dict[str, torch.Tensor]:
        return {
            own: memory.view(0, slot.dtype, slot.offset, slot.sizes, slot.strides)
            for own, slot in self._slots[name].items()
        }

    @staticmethod
    def _address(memory: Memory) -> int:
        return memory.storages[0].data_ptr() if memory.storages else 0


_OWN_DICTS = frozenset({"_parameters", "_buffers", "_modules"})


def _stand_in(layer: nn.Module, views: Mapping[str, torch.Tensor]) -> nn.Module:
    """An object of the layer's class with its attributes and tensors of its own: the layer itself is not touched."""
    stand_in = object.__new__(type(layer))
    stand_in.__dict__.update(layer.__dict__)
    stand_in.__dict__["_parameters"] = {
        own: nn.Parameter(views[own], requires_grad=False) if own in views else parameter
        for own, parameter in layer._parameters.items()
    }
    stand_in.__dict__["_buffers"] = {own: views.get(own, buffer) for own, buffer in layer._buffers.items()}
    stand_in.__dict__["_modules"] = dict(layer._modules)
    return stand_in


@torch.no_grad()
def _exchange(layer: nn.Module, kernels: Kernels) -> Kernels:
    """Give the layer these kernels and return those it had."""
    before = Kernels()
    tensors = own_tensors(layer)
    method = api.quant_method(layer)
    in_place = method is None or api.keeps_load_format(method)
    for own, data in kernels.data.items():
        tensor = tensors[own]
        if in_place:
            before.data[own] = tensor.detach().clone()
            tensor.detach().copy_(data)
        else:
            before.data[own] = tensor.data
            tensor.data = data
    for attribute, value in kernels.attributes.items():
        if attribute in layer.__dict__:
            before.attributes[attribute] = layer.__dict__[attribute]
        layer.__dict__[attribute] = value
    return before


def plan_mirror(
    layers: Sequence[LayerTensors], numbers: Mapping[int, int], landings: Sequence[Placement], manifest: Manifest
) -> tuple[Slots, list[Placement]]:
    """Return the form of a mirror for all tensors that have landings, in the manifest's order, and the landings in that mirror.

    ``numbers`` has, by address, the number of the storage in which each tensor of the layers was recorded.
    """
    slots = _slots_for(layers, numbers, landings, manifest)
    moved = landings_in(slots, layers, numbers, landings)
    return replace(slots, is_padded=is_padded(moved)), moved


def landings_in(
    slots: Slots, layers: Sequence[LayerTensors], numbers: Mapping[int, int], landings: Sequence[Placement]
) -> list[Placement]:
    """Return landings of the layers' stand-ins, moved to a mirror. Tensors that the mirror has in another form, or not at all, are left
    out."""
    starts: dict[int, int] = {}
    for name, own, tensor, number in _recorded(layers, numbers):
        slot = slots.layers.get(name, {}).get(own)
        if slot is not None and _slot(tensor, slot.offset) == slot:
            starts[number] = (slot.offset - int(tensor.storage_offset())) * tensor.itemsize
    return [
        msgspec.structs.replace(
            landing, storage=0, offset=landing.offset + starts[landing.storage] // itemsize_of(landing.dtype)
        )
        for landing in landings
        if landing.storage in starts
    ]


def _slots_for(
    layers: Sequence[LayerTensors], numbers: Mapping[int, int], landings: Sequence[Placement], manifest: Manifest
) -> Slots:
    order = {spec.name: number for number, spec in enumerate(manifest.tensors)}
    firsts: dict[int, int] = {}
    for landing in landings:
        firsts[landing.storage] = min(order[landing.region.name], firsts.get(landing.storage, len(order)))
    found: dict[str, dict[str, tuple[int, torch.Tensor]]] = {}
    sizes: dict[int, int] = {}
    for name, own, tensor, number in _recorded(layers, numbers):
        if number in firsts:
            found.setdefault(name, {})[own] = (number, tensor)
            sizes[number] = bytes_of(tensor.detach()).numel()
    starts, end = {}, 0
    for number in sorted(firsts, key=firsts.__getitem__):
        starts[number], end = end, align(end + sizes[number])
    slots = {
        name: {
            own: _slot(tensor, starts[number] // tensor.itemsize + int(tensor.storage_offset()))
            for own, (number, tensor) in tensors.items()
        }
        for name, tensors in found.items()
    }
    return Slots(slots, end)


def _recorded(
    layers: Sequence[LayerTensors], numbers: Mapping[int, int]
) -> Iterator[tuple[str, str, torch.Tensor, int]]:
    """Tensors of layers that were recorded: the layer's name, the tensor's own, the tensor, and the number of its storage."""
    for layer in layers:
        for own, tensor in {**layer.required, **layer.optional}.items():
            number = numbers.get(bytes_of(tensor.detach()).data_ptr()) if tensor.numel() else None
            if number is not None:
                yield layer.name, own, tensor, number


def _slot(tensor: torch.Tensor, offset: int) -> Slot:
    return Slot(dtype=name_of(tensor.dtype), offset=offset, sizes=tuple(tensor.shape), strides=tuple(tensor.stride()))
