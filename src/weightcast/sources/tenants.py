"""Tenants: a module's own tensors in an arena, each storage of the user's as a storage of its own there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from weightcast.layout.memory import own_storage


class Tenants:
    """The parameters and buffers of a module, grouped by the storage that they share. Moves each storage into an arena and out again.

    A storage is moved only when nothing but these tensors refers to it. Another reference (a state dict that is kept, a flat buffer
    that an optimizer writes to, another process after ``share_memory()``) would stay behind with the old memory. A storage with another
    reference stays where it is, and ``copy`` copies it into the arena. Of an array whose memory a tensor was made of, as by
    ``torch.from_numpy``, nothing can be known. Parameter objects stay, and ``param.data`` is rebound.
    """

    def __init__(self, values: Iterable[torch.Tensor], numbers: Iterable[int]) -> None:
        self._groups: dict[int, list[torch.Tensor]] = {}
        for value, number in zip(values, numbers, strict=True):
            self._groups.setdefault(number, []).append(value)
        self._moved: dict[int, int] = {}
        """Addresses of the storages that were moved, by number."""
        self._left: dict[int, StorageWeakRef] = {}
        """The same storages, which live for as long as a tensor refers to them."""
        self._copies: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.staying: dict[int, torch.Tensor] = {}
        """The storages that stay where they are, by number."""

    def of(self, number: int) -> Sequence[torch.Tensor]:
        """Return the module's tensors in a storage."""
        return self._groups.get(number, ())

    def share_storage(self, number: int) -> bool:
        """Whether the module's tensors that shared a storage at connect still share one."""
        return len({value.untyped_storage().data_ptr() for value in self._groups[number]}) == 1

    def lie_at(self, number: int, arena: torch.Tensor, start: int) -> bool:
        """Whether the module's tensors in a storage lie at that byte of an arena."""
        return self._groups[number][0].untyped_storage().data_ptr() == arena.data_ptr() + start

    def left_nothing(self, number: int) -> bool:
        """Whether no tensor refers to the place in the arena that the module's tensors in a storage were moved to."""
        return number not in self._left or bool(self._left[number].expired())  # type: ignore[no-untyped-call]

    def move_into(self, arena: torch.Tensor, starts: Sequence[int], *, references: int) -> None:
        """Go on in an arena that holds the same bytes: storage i begins at byte ``starts[i]``. What lies there already stays as it is.

        ``references`` is the number of tensors that the caller has on each storage beside the module's.
        """
        self._copies, self.staying = ([], []), {}
        for number, values in self._groups.items():
            storage, start = values[0].untyped_storage(), starts[number]
            if self.lie_at(number, arena, start):
                continue
            if _is_shared_with_others(storage, len(values) + references) or _is_mapped_shared(storage):
                self.staying[number] = _flat(storage)
                self._copies[0].append(arena[start : start + storage.nbytes()])
                self._copies[1].append(self.staying[number])
            else:
                own = own_storage(arena, start, storage.nbytes())
                _rebind(values, own)
                self._moved[number], self._left[number] = own.data_ptr(), StorageWeakRef(own)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def copy(self) -> None:
        """Copy into the arena those storages that stay where they are."""
        if self.staying:
            torch._foreach_copy_(*self._copies)

    def leave(self) -> None:
        """Move each storage that was moved, and still lies where it was moved to, back into private memory with its present values. A
        storage that something else refers to by now stays, because that other reference would be left behind."""
        self._copies, self.staying = ([], []), {}
        for number, address in self._moved.items():
            values = [value for value in self._groups[number] if value.untyped_storage().data_ptr() == address]
            if values and not _is_shared_with_others(storage := values[0].untyped_storage(), len(values)):
                private = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
                private.copy_(_flat(storage))
                _rebind(values, private.untyped_storage())
        self._moved.clear()
        self._left.clear()


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage."""
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    return flat.set_(storage)


def _is_shared_with_others(storage: torch.UntypedStorage, known: int) -> bool:
    """Whether more tensors than those ``known`` refer to a storage. Torch counts the Python object of it as well."""
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1 > known


def _is_mapped_shared(storage: torch.UntypedStorage) -> bool:
    """Whether a storage in host memory is mapped so that other processes may read and write it, as after ``share_memory()``. Linux."""
    if not storage.is_shared():
        return False
    address = storage.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split(maxsplit=2)
        first, end = (int(number, 16) for number in span.split("-"))
        if first <= address < end:
            return permissions.endswith("s")
    return True


@torch.no_grad()
def _rebind(values: Sequence[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Point tensors that share a storage at the same bytes of another one."""
    for value in values:
        moved = torch.empty(0, dtype=value.dtype, device=value.device)
        moved.set_(storage, value.storage_offset(), value.size(), value.stride())
        value.data = moved
