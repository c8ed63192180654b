"""SglangModel: the live model of one SGLang worker, whose parameters are what its loader filled and what its forward pass reads.

A model for which that does not hold is refused by name: one that is quantised or packed, keeps something that was computed from its
weights, or has tensors that its loader computes with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weightcast.commit.worker_outcome import WEIGHTS
from weightcast.content.live_tensors import LiveTensor, live_tensors
from weightcast.engines.sglang.derived import refuse_derived
from weightcast.engines.stock.layers import LayerTensors, check_complete, checksums_of, own_tensors, shown, storages_of
from weightcast.engines.stock.record_check import names_that_differ
from weightcast.engines.stock.worker import StockModel
from weightcast.errors import LoadError, PlanMismatch, Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.names import number_of
from weightcast.record import Recording, record_layout

logger = logging.getLogger(__name__)


class SglangModel(StockModel):
    """A worker's model as SGLang built and loaded it. Call it on the scheduler's thread, between two steps."""

    def __init__(self, model: nn.Module, device: torch.device, sleeping_tags: Callable[[], tuple[str, ...]]) -> None:
        """Raises Unsupported, with the reason, for a model whose parameters are not all that it computes with."""
        refuse_derived(model)
        self.device = device
        self._model = model
        self._sleeping_tags = sleeping_tags
        self._layers = [_layer(name, layer) for name, layer in model.named_modules() if own_tensors(layer)]
        self._memory = Memory(storages_of(tensor for layer in self._layers for tensor in layer.tensors))
        self._layouts: dict[str, Layout] = {}

    def why_asleep(self) -> str:
        return "SGLang has released the memory of its weights" if WEIGHTS in self._sleeping_tags() else ""

    def memory(self) -> Memory:
        return self._memory

    def rebind(self, memory: Memory) -> None:
        """Not for this model: captured graphs hold the addresses of its parameters."""
        raise NotImplementedError("parameters of an SGLang model stay where they are")

    def layout(self, manifest: Manifest) -> Layout:
        """Landings in the parameters.

        Raises PlanMismatch when a parameter would be filled in part, LoadError when SGLang's loader refuses a tensor, Unsupported when
        the loader does more with a tensor than to copy it.
        """
        known = self._layouts.get(manifest.digest)
        if known is None:
            recording = self._record(manifest)
            self._check(manifest, recording)
            known = recording.layout
            self._layouts = {manifest.digest: known}
        return known

    def live_tensors(self, manifest: Manifest) -> dict[str, LiveTensor]:
        return live_tensors(manifest, self.layout(manifest).placements, {}, self._memory)

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Never needed: no tensor of a layout goes through the loader."""
        raise LoadError("SGLang's loader takes no part in a round")

    def checksums(self) -> dict[str, str]:
        return checksums_of(self._model)

    def _record(self, manifest: Manifest) -> Recording:
        recording = record_layout(self._load, manifest, self._memory, self.device, _refuses)
        numbers = {storage.data_ptr(): number for number, storage in enumerate(self._memory.storages)}
        check_complete(self._layers, numbers, recording)
        if recording.reasons:
            name, reason = next(iter(recording.reasons.items()))
            raise Unsupported(
                f"SGLang's loader does more than copy {number_of(len(recording.reasons), 'tensor')} of this model, such as {name}: {reason}",
                hint="Serve this model with vLLM or with weightcast serve",
            )
        if recording.foreign_writes:
            raise PlanMismatch(
                f"SGLang's loader fills a part of what it loads by itself: {shown(self._told(recording.foreign_writes))}",
                hint="Tensors that are smaller than the engine's parameters are of another model than the engine serves",
            )
        return recording

    def _told(self, writes: Iterable[str]) -> list[str]:
        """Writes of the loader, with a parameter's name for the number of a storage."""
        names = {
            tensor.untyped_storage().data_ptr(): f"{layer.name}.{own}"
            for layer in self._layers
            for own, tensor in {**layer.required, **layer.optional}.items()
        }
        storages = self._memory.storages
        return [
            re.sub(r"^storage (\d+)", lambda found: names.get(storages[int(found[1])].data_ptr(), found[0]), write)
            for write in writes
        ]

    def _check(self, manifest: Manifest, recording: Recording) -> None:
        """Compare the record with what the loader writes, in stand-ins. On a GPU only where there is room for these."""
        if not _has_room(self.device, self._memory.nbytes):
            logger.info("no room to compare the record of the loader with what the loader writes")
            return
        with _in_stand_ins(self._layers, self._memory, self.device) as stand_ins:
            differ = names_that_differ(self._load, manifest, stand_ins, recording)
        if differ:
            raise Unsupported(
                f"SGLang's loader writes {number_of(len(differ), 'tensor')} elsewhere than its record says: {shown(sorted(differ))}",
                hint="Serve this model with vLLM or with weightcast serve",
            )

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._model.load_weights(tensors)  # type: ignore[operator]


def _layer(name: str, layer: nn.Module) -> LayerTensors:
    required: dict[str, torch.Tensor] = {own: tensor for own, tensor in layer._parameters.items() if tensor is not None}
    kept = {
        own: tensor
        for own, tensor in layer._buffers.items()
        if tensor is not None and own not in layer._non_persistent_buffers_set
    }
    return LayerTensors(name, layer, landable=True, required=required, optional=kept)


def _refuses(error: Exception, name: str) -> bool:
    """Whether an exception of a loader says that the model has no place for the tensor of this name, which it took last."""
    if not isinstance(error, KeyError) or not error.args:
        return False
    wanted = str(error.args[0])
    return re.findall(r"\d+", wanted) == re.findall(r"\d+", name) and wanted.split(".")[-1] == name.split(".")[-1]


def _has_room(device: torch.device, nbytes: int) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes * 2 < free


@contextmanager
def _in_stand_ins(layers: Iterable[LayerTensors], live: Memory, device: torch.device) -> Iterator[Memory]:
    """The model with other memory, of the same form, behind its tensors; afterwards all of them are where they were.

    Tensors are not replaced, since loaders keep some of them: only what they point at changes.
    """
    others = [torch.zeros_like(storage) for storage in live.storages]
    number = {storage.data_ptr(): index for index, storage in enumerate(live.storages)}
    moved: list[tuple[torch.Tensor, Any]] = []
    try:
        for tensor in (tensor for layer in layers for tensor in layer.tensors if tensor.numel()):
            data = tensor.data
            other = others[number[data.untyped_storage().data_ptr()]]
            stand_in = torch.empty(0, dtype=data.dtype, device=device).set_(
                other.untyped_storage(), data.storage_offset(), data.shape, data.stride()
            )
            moved.append((tensor, data))
            tensor.data = stand_in
        yield Memory(others)
    finally:
        for tensor, data in moved:
            tensor.data = data
