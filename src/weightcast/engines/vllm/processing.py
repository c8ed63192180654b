"""Layers that vLLM processes after loading, such as quantised ones, processed beside the running engine.

vLLM's own reload loads and quantises such layers while the engine stands still. Here their weights land in memory of their own, in load
format; vLLM's step after loading runs on twins of the layers, one layer at a time; and going live is one exchange of bytes, or one copy.
Which layers this works for is tried on each layer, with what its twin makes of random values, before anything lands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from weightcast.engines.stock.layers import LayerTensors
from weightcast.engines.vllm import api
from weightcast.engines.vllm.layer_twin import LayerTwin, Pair, pairs_of, twin_of, unchanged
from weightcast.engines.vllm.mirror import Slots, plan_mirror
from weightcast.errors import LoadError, Unsupported
from weightcast.layout import Placement
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, align
from weightcast.manifest.names import kind_of
from weightcast.receiver.processing import Processing
from weightcast.receiver.swap import Swap

logger = logging.getLogger(__name__)


class Tried(NamedTuple):
    """What a twin showed of its layer."""

    pairs: list[Pair]
    overwrites: bool
    """Whether processing writes to what landed."""
    needs_device: bool
    """Whether processing makes tensors on torch's default device, which then has to be the layer's."""


class ProcessedLayers(Processing):
    """The layers of one worker's model that are processed beside the engine. See Processing."""

    def __init__(self, layers: Mapping[str, nn.Module], slots: Slots, device: torch.device) -> None:
        """``slots`` has the place of each unprocessed tensor. ``layers`` are those of ``Processable.layers``."""
        self._layers = {name: layer for name, layer in layers.items() if name in slots.layers}
        self._slots, self._device = slots, device
        self.nbytes, self.is_padded = slots.nbytes, slots.is_padded
        self._twins = {name: twin_of(layer) for name, layer in self._layers.items()}
        self._tried = {name: _try(layer, self._twins[name], device) for name, layer in self._layers.items()}
        sizes = [pair.live.nbytes for tried in self._tried.values() for pair in tried.pairs]
        self.processed_nbytes = sum(align(size) for size in sizes)
        self.scratch_nbytes = 4 * max((_nbytes(layer) for layer in self._layers.values()), default=0)
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._copied: frozenset[str] = frozenset()
        self._second: dict[str, list[torch.Tensor]] = {}
        self._swap: Swap | None = None

    def reserve(self, unprocessed: torch.Tensor, allocate: Callable[[int], torch.Tensor] | None) -> None:
        self.forget()
        memory = Memory([unprocessed])
        for name, layer in self._layers.items():
            form = api.load_format(layer)
            self._tensors[name] = {
                own: _dressed(memory.view(0, s.dtype, s.offset, s.sizes, s.strides), form.get(own), layer)
                for own, s in self._slots.layers[name].items()
            }
        on_host = unprocessed.device.type != self._device.type
        self._copied = frozenset(name for name, tried in self._tried.items() if on_host or tried.overwrites)
        if allocate is None:
            return
        second, start, swapped = allocate(self.processed_nbytes), 0, []
        for name, tried in self._tried.items():
            self._second[name] = []
            for pair in tried.pairs:
                part = second[start : start + pair.live.nbytes]
                start += align(pair.live.nbytes)
                self._second[name].append(part.view(pair.live.dtype).as_strided(pair.live.shape, pair.live.stride()))
                swapped.append((_flat(pair.live), part))
        self._swap = Swap(swapped)

    def compile(self) -> None:
        if self._swap is not None:
            self._swap.warm_up()

    def process(self) -> None:
        self._process(self._second)

    def exchange(self) -> None:
        if self._swap is not None:
            self._swap.run()

    def process_in_place(self) -> None:
        self._process({name: [pair.live for pair in tried.pairs] for name, tried in self._tried.items()})

    def forget(self) -> None:
        self._tensors.clear()
        self._second.clear()
        self._swap = None

    @torch.no_grad()
    def _process(self, targets: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Process one layer after the other, and copy what comes out to the layer's targets. Where processing writes to what landed, the
        twin is given a copy."""
        for name, twin in self._twins.items():
            tried = self._tried[name]
            try:
                with self._device if tried.needs_device else nullcontext():
                    processed = twin.processed(self._copies(name) if name in self._copied else self._tensors[name])
                for pair, target in zip(tried.pairs, targets[name], strict=True):
                    target.copy_(pair.of(processed))
            except Exception as error:
                raise LoadError(f"vLLM could not process {name}: {type(error).__name__}: {error}") from error
            finally:
                twin.release()

    def _copies(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        form = api.load_format(layer)
        return {
            own: _dressed(tensor.detach().to(self._device, copy=True), form.get(own), layer)
            for own, tensor in self._tensors[name].items()
        }


class Processable:
    """Which of a model's quantised layers can be processed beside the engine, and why the others cannot: these go through vLLM's reload.

    ``unfit`` has reasons by the layers' names with ``#`` for each number: layers of one kind are all fit or all unfit.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], device: torch.device, unfit: Mapping[str, str]) -> None:
        self._candidates = {name: model.get_submodule(name) for name in names}
        self._device = device
        self._tried = False
        self.unfit = dict(unfit)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers that can be processed beside the engine, by name. The first call tries each layer."""
        if not self._tried:
            self._tried = True
            for name, layer in self._candidates.items():
                reason = "" if kind_of(name) in self.unfit else _why_not(layer, self._device)
                if reason:
                    self._leave(kind_of(name), reason)
        return {name: layer for name, layer in self._candidates.items() if kind_of(name) not in self.unfit}

    def rule_out(self, places: Sequence[str], reason: str) -> bool:
        """Rule out the layers that have some of these places. Returns whether there were such layers."""
        kinds = {kind_of(name) for name in self.layers}
        found = {kind for kind in kinds for place in places if f"{kind_of(place)}.".startswith(f"{kind}.")}
        for kind in sorted(found):
            self._leave(kind, reason)
        return bool(found)

    def _leave(self, kind: str, reason: str) -> None:
        self.unfit[kind] = reason
        logger.warning("%s goes through vLLM's reload while the engine stands still: %s", kind, reason)


def _why_not(layer: nn.Module, device: torch.device) -> str:
    """Say why a layer cannot be processed beside the engine. Empty when the layer can be. Changes nothing of the layer."""
    try:
        with unchanged(layer):
            _try(layer, twin_of(layer), device)
    except Unsupported as error:
        return error.message
    except Exception as error:  # noqa: BLE001 - vLLM's code on an object that vLLM did not make: whatever it raises says no
        return f"{type(error).__name__}: {error}"
    return ""


def plan_unprocessed(
    layers: Sequence[LayerTensors], numbers: Mapping[int, int], landings: Sequence[Placement], manifest: Manifest
) -> tuple[Slots, list[Placement], list[Placement]]:
    """Return the form of these layers' unprocessed weights, the landings there, in storage 0, and the landings elsewhere."""
    inside = {
        numbers[pointer]
        for layer in layers
        for tensor in layer.tensors
        if tensor.numel() and (pointer := bytes_of(tensor.detach()).data_ptr()) in numbers
    }
    slots, moved = plan_mirror(layers, numbers, [p for p in landings if p.storage in inside], manifest)
    return slots, moved, [p for p in landings if p.storage not in inside]


def _try(layer: nn.Module, twin: LayerTwin, device: torch.device) -> Tried:
    """Have a twin process random values."""
    try:
        return _try_on(layer, twin, device, needs_device=False)
    except Exception:  # noqa: BLE001 - vLLM's code: whatever it raises may come from tensors on torch's default device
        return _try_on(layer, twin, device, needs_device=True)


@torch.no_grad()
def _try_on(layer: nn.Module, twin: LayerTwin, device: torch.device, *, needs_device: bool) -> Tried:
    generator = torch.Generator(device).manual_seed(0x5EED)
    given = {
        own: _dressed(_random(api.zeros_like(meta, device), generator), meta, layer)
        for own, meta in api.load_format(layer).items()
    }
    if (bias := layer._parameters.get("bias")) is not None and "bias" not in given:
        given["bias"] = nn.Parameter(_random(torch.zeros_like(bias), generator), requires_grad=False)
    before = {own: tensor.detach().clone() for own, tensor in given.items()}
    try:
        with device if needs_device else nullcontext():
            processed = twin.processed(given)
        pairs = pairs_of(layer, processed)
        for pair in pairs:
            pair.of(processed)
    finally:
        twin.release()
    overwrites = any(not torch.equal(_as_bytes(given[own]), _as_bytes(former)) for own, former in before.items())
    return Tried(pairs, overwrites, needs_device)


def _random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The tensor, filled with values that are neither extreme nor alike."""
    cells = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device=tensor.device) + 0.1
    return tensor.copy_(cells if tensor.dtype.is_floating_point else cells * 100)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten().view(torch.uint8)


def _dressed(tensor: torch.Tensor, meta: torch.Tensor | None, layer: nn.Module) -> torch.Tensor:
    """The tensor as vLLM's step after loading wants it: of the class, and with the attributes, that it was built with."""
    return nn.Parameter(tensor, requires_grad=False) if meta is None else api.dressed(tensor, meta, layer)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    start = int(tensor.storage_offset()) * tensor.itemsize
    return bytes_of(tensor)[start : start + tensor.nbytes]


def _nbytes(layer: nn.Module) -> int:
    return sum(meta.nbytes for meta in api.load_format(layer).values())
