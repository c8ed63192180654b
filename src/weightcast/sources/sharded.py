"""ShardedSource: publish what one rank of a distributed trainer holds of a model: its shards of DTensors, and plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import torch
from torch import nn

from weightcast.errors import InvalidInput
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, TensorSpec, align
from weightcast.manifest.dtypes import name_of
from weightcast.sources.base import Source, device_of, wait_for_stream
from weightcast.sources.conversions import Content, placed
from weightcast.sources.forms import Forms
from weightcast.sources.module import published_dtype
from weightcast.sources.shards import Part, check_dense, is_distributed, local_of, part_of, shard_of
from weightcast.sources.tree import Places, Tree


class ShardedSource(Source):
    """Holdings are this rank's shards. Nothing is gathered.

    With the ``module`` that the tensors are views of, shards are read where they are until a transport moves the memory. Shards
    themselves are never moved, because FSDP keeps views into them. A transport that needs other memory (shm) gets a mirror, which is
    filled at the start of each round. Without a module the mapping is read again and mirrored in every round. Names, shapes, placements
    and types have to stay the same then, and the values are those of the moment.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | Content,
        *,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
    ) -> None:
        content = tensors if isinstance(tensors, Content) else Content.plain(tensors)
        if not content.forms:
            raise InvalidInput("there is nothing to publish", field="source")
        self.dtype = dtype
        parts = {name: part_of(name, value) for name, value in sorted(content.tensors.items())}
        check_dense({name: part.values for name, part in parts.items()})
        self.device = device_of([part.values for part in parts.values()])
        self.manifest = Manifest.of(
            TensorSpec(name=form.name, dtype=published_dtype(form.dtype, dtype), shape=form.shape)
            for form in content.forms
        )
        self._views: list[torch.Tensor] = []
        self._own: tuple[torch.Tensor, ...] = ()
        self.is_copied = self.is_private = module is None
        self._owners: _Owners | None = None
        if module is None:
            held = {name: part for name, part in parts.items() if _is_held(part)}
            self._held_at = [i for i, part in enumerate(parts.values()) if _is_held(part)]
            self._tensors = content.tensors
            self._forms = Forms(content.tensors)
            self._make_arena(held)
        else:
            placements, storages, _ = placed(sorted(content.forms, key=attrgetter("name")), parts)
            self.layout = Layout(placements=placements, storage_nbytes=tuple(s.numel() for s in storages))
            self.memory = Memory(storages)
            self._owners = _Owners(module, self.memory)
            self._own = self.memory.storages

    def _make_arena(self, held: Mapping[str, Part]) -> None:
        placements, end = [], 0
        for name, part in held.items():
            values = part.values
            offset = end // values.element_size()
            placements.append(_placement(name, part, 0, offset, contiguous_strides(tuple(values.shape))))
            end = align(end + values.numel() * values.element_size())
        self.layout = Layout(placements=tuple(placements), storage_nbytes=(end,))
        self.rebind(Memory([torch.zeros(end, dtype=torch.uint8, device=self.device)], is_arena=True))

    @property
    def own_nbytes(self) -> int:
        return sum(self.layout.storage_nbytes) if self.is_copied else 0

    def rebind(self, memory: Memory) -> None:
        if tuple(s.numel() for s in memory.storages) != self.layout.storage_nbytes:
            raise InvalidInput("the new memory has other storages than the old one")
        self.memory = memory
        self.is_copied = True
        if self._owners is not None:
            self._views = list(memory.storages)
            return
        self._views = [
            memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides) for p in self.layout.placements
        ]

    def close(self) -> None:
        super().close()
        self._views, self._own = [], ()

    def check_form(self) -> None:
        self._current()

    def follow(self) -> bool:
        """Of a module whose tensors are read where they lie."""
        if self._owners is None or self.is_copied:
            return False
        storages = self._owners.storages(self.device)
        if storages is None:
            return False
        self._owners.follow()
        self.memory = Memory(storages)
        self._own = self.memory.storages
        return True

    def let_go(self) -> bool:
        if self._owners is None or self.is_copied:
            return False
        self.memory, self._own = Memory(()), ()
        return True

    def _current(self) -> list[torch.Tensor]:
        """The values that this rank holds now."""
        if self._owners is not None:
            self._owners.check()
            return list(self._own)
        now = self._forms.locals_of(self._tensors)
        return list(map(now.__getitem__, self._held_at))

    @torch.no_grad()
    def refresh(self) -> None:
        values = self._current()
        if self.is_copied and self._views:
            torch._foreach_copy_(self._views, values)
        wait_for_stream(self.device)


class _Owners:
    """The module's own parameters and buffers in a memory. A state dict shows aliases of them, which stay where they are when
    ``.to()`` or FSDP moves the parameters."""

    def __init__(self, module: nn.Module, memory: Memory) -> None:
        self._plain: list[torch.Tensor] = []
        self._sharded: list[torch.Tensor] = []
        numbers = {
            storage.untyped_storage().data_ptr(): number
            for number, storage in enumerate(memory.storages)
            if storage.numel()
        }
        self._nbytes = [storage.numel() for storage in memory.storages]
        for value in [*module.parameters(), *module.buffers()]:
            local = local_of(value)
            if local.numel() and local.untyped_storage().data_ptr() in numbers:
                (self._sharded if is_distributed(value) else self._plain).append(value)
        owned = [*self._plain, *self._sharded]
        self._tree = Tree(module, owned)
        self._numbers = [numbers[value.untyped_storage().data_ptr()] for value in self._locals()]
        self._places = Places(self._locals, self._tree.names_of(owned))
        self._offsets = self._current_offsets()

    def _locals(self) -> list[torch.Tensor]:
        return [*self._plain, *map(shard_of, self._sharded)]

    def _current_offsets(self) -> list[int | torch.SymInt]:
        return list(map(torch.Tensor.storage_offset, self._locals()))

    def storages(self, device: torch.device) -> list[torch.Tensor] | None:
        """The storages where they are now; None where they are not as before: on the device, as large, and as much shared."""
        found: dict[int, torch.Tensor] = {}
        self._tree.check()
        if not self._places.keep_form() or self._current_offsets() != self._offsets:
            return None
        for number, value in zip(self._numbers, self._locals(), strict=True):
            flat = bytes_of(value.detach())
            if flat.data_ptr() != found.setdefault(number, flat).data_ptr():
                return None
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        storages = [found.get(number, empty) for number in range(len(self._nbytes))]
        is_as_before = [storage.numel() for storage in storages] == self._nbytes
        return storages if is_as_before and all(storage.device == device for storage in storages) else None

    def follow(self) -> None:
        """Where they are now is what later checks compare with."""
        self._places.follow()

    def check(self) -> None:
        """Raise WeightsMoved when one of them was moved, StateError when it was replaced or has another form.

        FSDP puts gathered plain tensors in the place of shards for as long as it computes; the shards stay what they are.
        """
        self._tree.check()
        self._places.check()


def _is_held(part: Part) -> bool:
    """Empty shards of tensors that have elements are held by nobody."""
    return part.values.numel() > 0 or 0 in part.shape


def _placement(name: str, part: Part, storage: int, offset: int, strides: tuple[int, ...]) -> Placement:
    region = Region(name=name, offsets=part.offsets, sizes=tuple(part.values.shape))
    return Placement(region=region, dtype=name_of(part.values.dtype), storage=storage, offset=offset, strides=strides)
