"""Tenants: a module's own tensors in an arena, each storage of the user's as a storage of its own there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from weightcast.layout.memory import own_storage


class Tenants:
    """The parameters and buffers of a module, by the storage that they share, and the way of each storage into arenas and out.

    Only a storage that nothing but these tensors refers to is moved: an alias elsewhere (a state dict that is kept, a flat buffer
    that an optimizer writes to) would be left behind with the old memory. Such a storage stays where it is and is copied into the
    arena by ``copy``. Parameter objects stay; ``param.data`` is rebound.
    """

    def __init__(self, values: Iterable[torch.Tensor], numbers: Iterable[int]) -> None:
        self._groups: dict[int, list[torch.Tensor]] = {}
        for value, number in zip(values, numbers, strict=True):
            self._groups.setdefault(number, []).append(value)
        self._moved: dict[int, int] = {}
        """Addresses of the storages that were moved, by number."""
        self._copies: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self.staying: dict[int, torch.Tensor] = {}
        """The storages that stay where they are, by number."""

    def of(self, number: int) -> Sequence[torch.Tensor]:
        """The module's tensors in a storage."""
        return self._groups.get(number, ())

    def share_storage(self, number: int) -> bool:
        """Whether the module's tensors that were in one storage still are."""
        return len({value.untyped_storage().data_ptr() for value in self._groups[number]}) == 1

    def move_into(self, arena: torch.Tensor, starts: Sequence[int], *, references: int) -> None:
        """Continue in an arena that holds the same bytes, storage i from byte ``starts[i]`` on.

        ``references``: how many tensors the caller has on each storage beside the module's.
        """
        self._copies, self.staying = ([], []), {}
        for number, values in self._groups.items():
            storage, start = values[0].untyped_storage(), starts[number]
            if _is_shared_with_others(storage, len(values) + references):
                self.staying[number] = _flat(storage)
                self._copies[0].append(arena[start : start + storage.nbytes()])
                self._copies[1].append(self.staying[number])
            else:
                own = own_storage(arena, start, storage.nbytes())
                _rebind(values, own)
                self._moved[number] = own.data_ptr()

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the storages that stay where they are into the arena."""
        if self.staying:
            torch._foreach_copy_(*self._copies)

    def leave(self) -> None:
        """Move back into private memory whatever was moved and still is where it was moved to, with its present values. A storage
        that something else refers to by now stays, for that not to be left behind."""
        self._copies, self.staying = ([], []), {}
        for number, address in self._moved.items():
            values = [value for value in self._groups[number] if value.untyped_storage().data_ptr() == address]
            if values and not _is_shared_with_others(storage := values[0].untyped_storage(), len(values)):
                private = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
                private.copy_(_flat(storage))
                _rebind(values, private.untyped_storage())
        self._moved.clear()


def _flat(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage."""
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    return flat.set_(storage)


def _is_shared_with_others(storage: torch.UntypedStorage, known: int) -> bool:
    """Whether more tensors than those ``known`` refer to a storage. Torch counts the Python object of it as well."""
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1 > known


@torch.no_grad()
def _rebind(values: Sequence[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Point tensors that share a storage at the same bytes of another one."""
    for value in values:
        moved = torch.empty(0, dtype=value.dtype, device=value.device)
        moved.set_(storage, value.storage_offset(), value.size(), value.stride())
        value.data = moved
