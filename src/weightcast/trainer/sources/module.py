"""ModuleSource: publish an nn.Module's parameters and persistent buffers from where they are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from weightcast.dtypes import dtype_of, name_of
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.layout import Layout, Placement, is_padded
from weightcast.manifest import Manifest, TensorSpec, align
from weightcast.memory import Memory
from weightcast.trainer.sources.base import Source, device_of, wait_for_stream
from weightcast.trainer.sources.conversions import Content, placed, read_module
from weightcast.trainer.sources.shards import is_distributed, part_of


class ModuleSource(Source):
    """Reads parameters in place: nothing is copied or gathered before a transport takes the bytes.

    ``dtype``: publish floating-point tensors in this type (fp32 masters as bf16, say); values are cast on their way. With shared
    memory the parameters are moved into it once: ``param.data`` is rebound, Parameter objects stay, optimizers notice
    nothing. ``names`` maps checkpoint names to tensors for modules whose own names are not the checkpoint's.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        names: Mapping[str, torch.Tensor] | Content | None = None,
    ) -> None:
        self._module, self.dtype = module, dtype
        content = (
            names if isinstance(names, Content) else read_module(module) if names is None else Content.plain(names)
        )
        # In the manifest's order, so that a memory that the parameters move to is laid out as the image is.
        tensors, forms = content.tensors, sorted(content.forms, key=operator.attrgetter("name"))
        if not forms:
            raise InvalidInput("the module has no parameters", field="source")
        check_kinds(tensors)
        self.device = device_of(list(tensors.values()))
        self.manifest = Manifest.of(
            TensorSpec(name=form.name, dtype=published_dtype(form.dtype, dtype), shape=form.shape) for form in forms
        )
        placements, storages, numbers = placed(forms, {name: part_of(name, value) for name, value in tensors.items()})
        self.memory = Memory(storages)
        self.layout = Layout(placements=placements, storage_nbytes=tuple(s.numel() for s in storages))
        self._bound = self._find_bound(numbers)
        self._refuse_strangers(tensors, numbers)
        self._values = [value for value, _ in self._bound]
        self._slots = Slots(module, self._values)
        self._note_places()

    def _find_bound(self, numbers: dict[int, int]) -> list[tuple[torch.Tensor, int]]:
        """Parameters and buffers that lie in the published storages, with the storage's number."""
        found = []
        for value in [*self._module.parameters(), *self._module.buffers()]:
            number = numbers.get(value.untyped_storage().data_ptr()) if value.numel() else None
            if number is not None:
                found.append((value, number))
        return found

    def _refuse_strangers(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[int, int]) -> None:
        """Values that are computed for a state dict would be read once, and be those of that moment for ever."""
        bound = {number for _, number in self._bound}
        for name, value in tensors.items():
            if value.numel() and numbers[value.untyped_storage().data_ptr()] not in bound:
                raise InvalidInput(
                    f"{name!r} lies in no parameter or buffer of the module",
                    field="source",
                    hint="Give a state dict, which is read anew in every round",
                )

    def _note_places(self) -> None:
        """What is there now is what later rounds compare with."""
        self._addresses = self._current_addresses()
        self._untyped = [storage.untyped_storage() for storage in self.memory.storages]
        self._sizes = self._current_sizes()

    def _current_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._values))

    def _current_sizes(self) -> list[int]:
        return list(map(torch.UntypedStorage.nbytes, self._untyped))

    def consolidate(self) -> None:
        starts, end = [], 0
        for storage in self.memory.storages:
            starts.append(end)
            end = align(end + storage.numel())
        arena = torch.zeros(end, dtype=torch.uint8, device=self.device)
        for start, storage in zip(starts, self.memory.storages, strict=True):
            arena[start : start + storage.numel()].copy_(storage)
        placements = []
        for placement in self.layout.placements:
            shift = starts[placement.storage] // dtype_of(placement.dtype).itemsize
            placements.append(
                Placement(
                    region=placement.region,
                    dtype=placement.dtype,
                    storage=0,
                    offset=placement.offset + shift,
                    strides=placement.strides,
                )
            )
        memory = Memory([arena], is_arena=self._is_covered() and is_padded(placements))
        self._move([(arena, start) for start in starts])
        self._bound = [(value, 0) for value, _ in self._bound]
        self.memory = memory
        self.layout = Layout(placements=tuple(placements), storage_nbytes=(end,))
        self._note_places()

    def _is_covered(self) -> bool:
        """Whether published tensors fill their storages, so that nothing but padding lies between them in an arena."""
        filled: dict[int, dict[int, int]] = {}
        for placement in self.layout.placements:
            itemsize = dtype_of(placement.dtype).itemsize
            spans = filled.setdefault(placement.storage, {})
            spans[placement.offset * itemsize] = placement.region.numel * itemsize
        sizes = self.layout.storage_nbytes
        return all(sum(spans.values()) == sizes[number] for number, spans in filled.items())

    def rebind(self, memory: Memory) -> None:
        if tuple(s.numel() for s in memory.storages) != self.layout.storage_nbytes:
            raise InvalidInput("the new memory has other storages than the old one")
        self._move([(storage, 0) for storage in memory.storages])
        self.memory = memory
        self._note_places()

    def close(self) -> None:
        super().close()
        self._untyped = []

    @torch.no_grad()
    def _move(self, targets: list[tuple[torch.Tensor, int]]) -> None:
        """Point every bound tensor at its place in the target of its storage's number."""
        for value, number in self._bound:
            flat, start = targets[number]
            base = self.memory.storages[number].storage_offset()
            offset = value.storage_offset() * value.element_size() - base + start + flat.storage_offset()
            moved = torch.empty(0, dtype=value.dtype, device=value.device)
            moved.set_(flat.untyped_storage(), offset // value.element_size(), value.size(), value.stride())
            value.data = moved

    def refresh(self) -> None:
        self.fill()
        self.check()

    def fill(self) -> None:
        # This source keeps the storages alive, whatever became of the parameters; but one that was resized to nothing gave its
        # memory back.
        refuse_moved(self._current_sizes(), self._sizes)
        wait_for_stream(self.device)

    def check(self) -> None:
        self._slots.check()
        refuse_moved(self._current_addresses(), self._addresses)


class Slots:
    """Where a module keeps parameters and buffers. One that was replaced leaves the published one behind, with old values; a
    round waits for the check, so it goes without a loop in Python."""

    def __init__(self, module: nn.Module, values: Iterable[torch.Tensor]) -> None:
        wanted = set(map(id, values))
        found = [
            (slots, key, value, f"{name}.{key}".lstrip("."))
            for name, child in module.named_modules()
            for slots in (child._parameters, child._buffers)
            for key, value in slots.items()
            if id(value) in wanted
        ]
        self._slots, self._keys = [slots for slots, *_ in found], [key for _, key, *_ in found]
        self._held, self._names = [value for *_, value, _ in found], [name for *_, name in found]

    def check(self, replaced: Callable[[Any], bool] = lambda value: True) -> None:
        """Raise StateError with the name of the first that is another object now, if ``replaced`` says so of that object."""
        now = list(map(dict.get, self._slots, self._keys))
        if all(map(operator.is_, now, self._held)):
            return
        for name, value, held in zip(self._names, now, self._held, strict=True):
            if value is not held and replaced(value):
                raise StateError(
                    f"{name!r} of the module was replaced by another tensor since connect()",
                    hint="Copy new values into it (with torch.no_grad(): parameter.copy_(values)), or connect again",
                )


def refuse_moved(now: list[int], then: list[int]) -> None:
    """Raise StateError when parameters do not lie where they lay."""
    if now != then:
        raise StateError(
            "parameters of the module were moved since connect()",
            hint="Do not call .to() or replace .data of a published module; connect again",
        )


_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def published_dtype(held: torch.dtype, wanted: torch.dtype | None) -> str:
    """The name of the type that a tensor is published in. Integers, and values in float8, which have scales, stay as they are.

    Raises InvalidInput for a wanted type that a cast alone does not make.
    """
    _check_dtype(wanted)
    return name_of(wanted if wanted is not None and held in _CASTABLE else held)


def _check_dtype(dtype: object) -> None:
    if dtype is None or dtype in _CASTABLE:
        return
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        reason = f"values in {dtype} mean nothing without scales, which a cast does not make"
        hint = "Leave dtype out and give the quantised tensors with their scales, as a checkpoint has them"
    else:
        reason = f"dtype is a floating-point type of torch, not {dtype!r}"
        hint = f"Use one of {', '.join(map(str, _CASTABLE))}, or leave it out: each engine casts to its own types"
    raise InvalidInput(reason, field="dtype", hint=hint)


def check_kinds(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported for what is not a plain dense tensor, shards included."""
    for name, value in tensors.items():
        if is_distributed(value):
            raise Unsupported(f"{name!r} is a DTensor", hint="Give the module or state dict itself to Publisher")
    check_dense(tensors)


def check_dense(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Unsupported for tensors without strided values of their own."""
    for name, value in tensors.items():
        if value.is_meta or value.is_sparse or value.is_quantized or value.layout is not torch.strided:
            raise Unsupported(f"{name!r} is not a plain dense tensor ({value.layout}, {value.device})")
