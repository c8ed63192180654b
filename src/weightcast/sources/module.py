"""ModuleSource: publish an nn.Module's parameters and persistent buffers from where they are."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import name_of
from weightcast.sources.arenas import is_covered, one_arena
from weightcast.sources.base import Source, device_of, wait_for_stream
from weightcast.sources.conversions import Content, placed, read_module
from weightcast.sources.shards import check_dense, has_other_bytes, is_distributed, part_of
from weightcast.sources.tenants import Tenants
from weightcast.sources.tree import Places, Tree, moved_error, named

logger = logging.getLogger(__name__)


class ModuleSource(Source):
    """Publishes the parameters and persistent buffers of a module from where they lie; nothing is copied or gathered first.

    ``dtype`` is the type in which floating-point tensors are published, such as bfloat16 for float32 masters; values are cast on their
    way. On a CPU the parameters move into one arena once, and ``close`` moves them back: ``param.data`` is rebound, Parameter objects
    stay, optimizers notice nothing, and tensors that shared a storage still share one while nothing
    else comes to share that storage (see Tenants). ``names`` maps
    checkpoint names to tensors for modules whose own names are not the checkpoint's.
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
        bound = self._find_bound(numbers)
        self._refuse_strangers(tensors, numbers, {number for _, number in bound})
        self._values = [value for value, _ in bound]
        self._offsets = list(map(torch.Tensor.storage_offset, self._values))
        self._tenants = Tenants(self._values, [number for _, number in bound])
        self._tree = Tree(module, self._values)
        self._starts: list[int] | None = None
        """Where in the one arena each storage of the user's begins, once there is an arena."""
        self._tenant_sizes: tuple[int, ...] = ()
        """The bytes of each of them."""
        self._note_places()

    def _find_bound(self, numbers: dict[int, int]) -> list[tuple[torch.Tensor, int]]:
        """Parameters and buffers that lie in the published storages, with the storage's number."""
        found = []
        for value in [*self._module.parameters(), *self._module.buffers()]:
            number = numbers.get(value.untyped_storage().data_ptr()) if value.numel() else None
            if number is not None:
                found.append((value, number))
        return found

    @staticmethod
    def _refuse_strangers(tensors: Mapping[str, torch.Tensor], numbers: Mapping[int, int], bound: set[int]) -> None:
        """Values that are computed for a state dict would be read once, and be those of that moment for ever."""
        for name, value in tensors.items():
            if value.numel() and numbers[value.untyped_storage().data_ptr()] not in bound:
                raise InvalidInput(
                    f"{name!r} lies in no parameter or buffer of the module",
                    field="source",
                    hint="Give a state dict, which is read anew in every round",
                )

    def _note_places(self) -> None:
        """What is there now is what later rounds compare with."""
        self._places = Places(lambda: self._values, self._tree.names_of(self._values))
        read = dict(enumerate(self.memory.storages)) if self._starts is None else self._tenants.staying
        self._read = list(read)
        self._untyped = [storage.untyped_storage() for storage in read.values()]
        self._sizes = self._current_sizes()

    def _current_sizes(self) -> list[int]:
        return list(map(torch.UntypedStorage.nbytes, self._untyped))

    def _names_in(self, numbers: Iterable[int]) -> list[str]:
        """The module's names of what lies in these storages of the user's."""
        return self._tree.names_of(value for number in numbers for value in self._tenants.of(number))

    @property
    def own_nbytes(self) -> int:
        return sum(storage.numel() for storage in self._tenants.staying.values())

    def consolidate(self) -> None:
        if self._starts is not None:
            return
        starts, layout = one_arena(self.layout)
        arena = torch.zeros(layout.storage_nbytes[0], dtype=torch.uint8, device=self.device)
        for start, storage in zip(starts, self.memory.storages, strict=True):
            arena[start : start + storage.numel()].copy_(storage)
        memory = Memory([arena], is_arena=is_covered(self.layout, layout))
        # This source has a tensor on each storage, too.
        self._move(arena, starts, references=1)
        self.memory, self._starts = memory, starts
        self._tenant_sizes = self.layout.storage_nbytes
        self.layout = layout
        self._note_places()

    def rebind(self, memory: Memory) -> None:
        if tuple(s.numel() for s in memory.storages) != self.layout.storage_nbytes:
            raise InvalidInput("the new memory has other storages than the old one")
        if self._starts is None:
            raise StateError("a module's parameters are moved out of one arena into another", hint="Call consolidate()")
        self._move(memory.storages[0], self._starts, references=0)
        self.memory = memory
        self._note_places()

    def _move(self, arena: torch.Tensor, starts: list[int], *, references: int) -> None:
        known = set(self._tenants.staying)
        self._tenants.move_into(arena, starts, references=references)
        if news := [number for number in self._tenants.staying if number not in known]:
            logger.warning(
                "not moved, but copied in each round: %s. Something beside the module refers to their memory, such as a state dict "
                "that is kept, a loss whose backward() is to come, or another process",
                named(self._names_in(news)),
            )

    def close(self) -> None:
        self._tenants.leave()
        super().close()
        self._untyped = []

    def refresh(self) -> None:
        self.fill()
        self.check()

    def fill(self) -> None:
        self.gather()
        wait_for_stream(self.device)

    def gather(self) -> None:
        # This source keeps the storages alive, whatever became of the parameters; but one that was resized to nothing gave its
        # memory back.
        self._check_sizes()
        if self._places.have_moved():
            self.check()
        self._tenants.copy()

    def check(self) -> None:
        self._tree.check()
        self._places.check()

    def check_form(self) -> None:
        self._check_sizes()
        self.check()

    def follow(self) -> bool:
        """Where tensors that shared storages still do, as they did. An arena that had them takes them up again, where nothing of the
        user's refers to what they left there."""
        self._tree.check()
        sizes = self.layout.storage_nbytes if self._starts is None else self._tenant_sizes
        is_closed = self._starts is not None and not self.memory.storages
        # What is empty has no place in an arena to be taken back to.
        numbers = [number for number, size in enumerate(sizes) if size or self._starts is None]
        if is_closed or not all(map(self._tenants.of, numbers)):
            return False
        storages = {number: bytes_of(self._tenants.of(number)[0].detach()) for number in numbers}
        is_as_before = (
            all(storage.numel() == sizes[number] for number, storage in storages.items())
            and all(storage.device == self.device for storage in storages.values())
            and list(map(torch.Tensor.storage_offset, self._values)) == self._offsets
            and all(map(self._tenants.share_storage, numbers))
            and not any(map(has_other_bytes, self._values))
        )
        if not is_as_before:
            return False
        self._places.check_form()
        if self._starts is None:
            self.memory = Memory(list(storages.values()))
        elif not self._take_back_in(self._starts, storages):
            return False
        self._note_places()
        return True

    def _take_back_in(self, starts: list[int], storages: Mapping[int, torch.Tensor]) -> bool:
        """Have tensors that left the arena in it again, with the values that they have now."""
        arena = self.memory.storages[0]
        gone = [number for number in storages if not self._tenants.lie_at(number, arena, starts[number])]
        if not all(self._tenants.left_nothing(number) for number in gone):
            return False
        for number in gone:
            arena[starts[number] : starts[number] + storages[number].numel()].copy_(storages[number])
        # This source has a tensor on each storage, too.
        self._move(arena, starts, references=1)
        return True

    def let_go(self) -> bool:
        if self._starts is not None:
            return False
        self.memory, self._read, self._untyped, self._sizes = Memory(()), [], [], []
        return True

    def _check_sizes(self) -> None:
        now = self._current_sizes()
        if now != self._sizes:
            changed = [n for n, size, then in zip(self._read, now, self._sizes, strict=True) if size != then]
            raise moved_error(self._names_in(changed))


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
