"""The embedded engine's live model: a transformers model whose parameters lie in one arena, in checkpoint order."""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from transformers import PreTrainedModel

from weightcast.content.layout_digest import digest_tensor
from weightcast.content.live_tensors import TensorDigest, live_tensors, tensor_digests
from weightcast.engines.embedded.conversion import CheckpointLoader
from weightcast.errors import InvalidInput, PlanMismatch, Unsupported
from weightcast.layout import Layout, contiguous_strides, is_padded
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, align
from weightcast.manifest.dtypes import itemsize_of, name_of
from weightcast.manifest.names import number_of, renaming_hint, shown
from weightcast.receiver.base import LiveModel
from weightcast.record import Recording, record_layout

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Slot:
    """One live tensor in the arena; tied parameters are one slot with several names."""

    names: list[str]
    tensors: list[torch.Tensor]
    offset_nbytes: int = field(default=0)

    @property
    def tensor(self) -> torch.Tensor:
        return self.tensors[0]


class EmbeddedModel(LiveModel):
    """The model's parameters and persistent buffers in one arena, aligned like an image, with zeros in the gaps.

    Making an EmbeddedModel moves the parameters into the arena, which takes twice the model's memory for that moment. Parameter objects
    stay the same.
    """

    relocatable = True

    _memory: Memory

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._slots = _slots_of(model)
        strangers = [slot.names[0] for slot in self._slots if slot.tensor.device != self.device]
        if strangers:
            raise Unsupported(
                f"{strangers[0]} is not on {self.device}, where the other parameters are",
                hint="Load the model on one device",
            )
        self._loader = CheckpointLoader(model)
        self._move(range(len(self._slots)))

    def memory(self) -> Memory:
        """Return the arena. It is another one after ``rebind``, and after a ``layout`` that changed the order of tensors."""
        return self._memory

    def layout(self, manifest: Manifest) -> Layout:
        """Return the landings in the arena. When another order of tensors follows the manifest better, the arena is built anew in that
        order first.

        Ask for ``memory()`` afterwards, therefore. Raises PlanMismatch for missing tensors, wrong shapes and incomplete experts.
        """
        recording = self._record(manifest)
        for name, reason in recording.reasons.items():
            logger.info("%s goes through the loader: %s", name, reason)
        layout = self._in_order(recording.layout, manifest)
        if not is_padded(layout.placements):
            # Pieces of fused parameters lie side by side.
            self._memory = Memory(self._memory.storages)
        return layout

    def rebind(self, memory: Memory) -> None:
        """Point all parameters at another arena of the same size and device."""
        have, want = [(s.numel(), s.device) for s in memory.storages], [(self._memory.nbytes, self.device)]
        if have != want:
            raise InvalidInput(f"the arena is {want[0][0]} bytes on {want[0][1]}, not {have}", field="memory")
        self._bind(memory)

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            self._loader.load(tensors)

    def unknown(self, names: Sequence[str]) -> Sequence[str]:
        return self._loader.unknown(names)

    def checksums(self) -> dict[str, str]:
        """Return the digest of each live tensor's bytes by the tensor's first name. Tied tensors appear once."""
        return {slot.names[0]: f"{digest_tensor(slot.tensor):016x}" for slot in self._slots}

    def tensor_digests(self, manifest: Manifest) -> dict[str, TensorDigest]:
        """Return what lies here of each tensor of a checkpoint. Changes nothing. Raises what ``layout`` raises."""
        recording = self._record(manifest)
        reasons = {name: f"goes through the loader: {reason}" for name, reason in recording.reasons.items()}
        return tensor_digests(manifest, [live_tensors(manifest, recording.layout.placements, reasons, self._memory)])

    def _record(self, manifest: Manifest) -> Recording:
        wrong = self._loader.problems({spec.name: spec.shape for spec in manifest.tensors})
        if wrong:
            raise PlanMismatch(shown(wrong, between="; "))
        recording = record_layout(self._load_known, manifest, self._memory, self.device)
        self._check_complete(recording)
        return recording

    def _load_known(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._loader.load(tensors, skip_unknown=True)

    def _check_complete(self, recording: Recording) -> None:
        """Raise PlanMismatch when the manifest leaves live bytes unfilled."""
        holes = recording.unwritten().get(0, [])
        missing = []
        for slot in self._slots:
            start, end = slot.offset_nbytes, slot.offset_nbytes + slot.tensor.nbytes
            if any(low < end and start < high for low, high in holes) and not self._loader.may_be_missing(
                slot.names[0]
            ):
                missing.append(slot.names[0])
        if missing:
            names = self._loader.checkpoint_names(missing)
            raise PlanMismatch(
                f"the model needs {number_of(len(names), 'tensor')} that the manifest lacks: {shown(names)}",
                hint=renaming_hint(recording.unused, names)
                or "Give the whole model, of the architecture that the engine serves",
            )

    def _in_order(self, layout: Layout, manifest: Manifest) -> Layout:
        """The layout after the arena's slots are put in the order of their first bytes in the manifest's image."""
        starts = [slot.offset_nbytes for slot in self._slots]
        slot_of = [bisect_right(starts, p.offset * itemsize_of(p.dtype)) - 1 for p in layout.placements]
        first = [manifest.image_nbytes] * len(starts)
        for number, placement in zip(slot_of, layout.placements, strict=True):
            first[number] = min(first[number], manifest.positions[placement.region.name])
        order = sorted(range(len(starts)), key=first.__getitem__)
        if order == list(range(len(starts))):
            return layout
        slots = list(self._slots)
        self._move(order)
        placements = tuple(
            msgspec.structs.replace(
                placement,
                offset=placement.offset
                + (slots[number].offset_nbytes - starts[number]) // itemsize_of(placement.dtype),
            )
            for number, placement in zip(slot_of, layout.placements, strict=True)
        )
        return msgspec.structs.replace(layout, placements=placements)

    @torch.no_grad()
    def _move(self, order: Sequence[int]) -> None:
        """Copy all live tensors into a new arena, in this order of slots."""
        self._slots = [self._slots[number] for number in order]
        end = 0
        for slot in self._slots:
            slot.offset_nbytes = end
            end = align(end + slot.tensor.nbytes)
        memory = Memory([torch.zeros(end, dtype=torch.uint8, device=self.device)], is_arena=True)
        for slot in self._slots:
            _view(memory, slot).copy_(slot.tensor)
        self._bind(memory)

    def _bind(self, memory: Memory) -> None:
        with torch.inference_mode(False):
            for slot in self._slots:
                view = _view(memory, slot)
                for tensor in slot.tensors:
                    tensor.data = view
        self._memory = memory


def _view(memory: Memory, slot: _Slot) -> torch.Tensor:
    """The place of a slot in an arena as a tensor."""
    tensor = slot.tensor
    sizes = tuple(tensor.shape)
    offset = slot.offset_nbytes // tensor.itemsize
    return memory.view(0, name_of(tensor.dtype), offset, sizes, contiguous_strides(sizes))


def _slots_of(model: PreTrainedModel) -> list[_Slot]:
    """Live tensors in the order of the state dict; those that are the same memory are one slot."""
    slots: dict[tuple[object, ...], _Slot] = {}
    ends: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        storage = tensor.untyped_storage().data_ptr()
        first = int(tensor.storage_offset()) * tensor.itemsize
        key = (storage, first, tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        slot = slots.setdefault(key, _Slot([], []))
        slot.names.append(name)
        if not any(tensor is known for known in slot.tensors):
            slot.tensors.append(tensor)
        if len(slot.names) == 1 and tensor.numel():
            last = 1 + sum((n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            ends.setdefault(storage, []).append((first, first + last * tensor.itemsize, name))
    for spans in ends.values():
        spans.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                raise Unsupported(f"{name} and {other} share some bytes but not all", hint="Clone one of them first")
    return list(slots.values())
