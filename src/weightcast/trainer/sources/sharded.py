"""ShardedSource: publish what one rank of a distributed trainer holds of a model: its shards of DTensors, and plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from weightcast.dtypes import name_of
from weightcast.errors import InvalidInput, StateError
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.manifest import Manifest, TensorSpec, align
from weightcast.memory import Memory, bytes_of
from weightcast.trainer.sources.base import Source, device_of
from weightcast.trainer.sources.module import check_dense, published_dtype
from weightcast.trainer.sources.shards import Part, local_of, part_of


class ShardedSource(Source):
    """Holdings are local shards; nothing is gathered.

    ``in_place``: shards are read where they are until a transport moves the memory. They are never moved themselves, as FSDP
    keeps views of its own into them; a transport that needs other memory (shm) gets a mirror, filled at the start of each
    round. Without ``in_place`` the mapping is read again and mirrored at every round: same names, shapes, placements and
    dtypes, values as they are then.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None, in_place: bool
    ) -> None:
        if not tensors:
            raise InvalidInput("there is nothing to publish", field="source")
        self._tensors = tensors
        parts = {name: part_of(name, value) for name, value in tensors.items()}
        check_dense({name: part.values for name, part in parts.items()})
        self.device = device_of([part.values for part in parts.values()])
        self.manifest = Manifest.of(
            TensorSpec(name=name, dtype=published_dtype(part.values.dtype, dtype), shape=part.shape)
            for name, part in parts.items()
        )
        self._forms = {name: _form(tensors[name], part.values) for name, part in parts.items()}
        self._held_at = [i for i, part in enumerate(parts.values()) if _is_held(part)]
        self._addresses = _addresses([part.values for part in parts.values()])
        self._views: list[torch.Tensor] = []
        self._is_mirror = not in_place
        held = {name: part for name, part in parts.items() if _is_held(part)}
        if in_place:
            self._read_in_place(held)
        else:
            self._make_arena(held)

    def _read_in_place(self, held: Mapping[str, Part]) -> None:
        numbers: dict[int, int] = {}
        storages: list[torch.Tensor] = []
        placements = []
        for name, part in held.items():
            values = part.values
            key = values.untyped_storage().data_ptr() if values.numel() else 0
            if key not in numbers:
                numbers[key] = len(storages)
                storages.append(bytes_of(values))
            offset = int(values.storage_offset()) if values.numel() else 0
            placements.append(_placement(name, part, numbers[key], offset, tuple(values.stride())))
        self.layout = Layout(placements=tuple(placements), storage_nbytes=tuple(s.numel() for s in storages))
        self.memory = Memory(storages)

    def _make_arena(self, held: Mapping[str, Part]) -> None:
        placements, end = [], 0
        for name, part in held.items():
            values = part.values
            offset = end // values.element_size()
            placements.append(_placement(name, part, 0, offset, contiguous_strides(tuple(values.shape))))
            end = align(end + values.numel() * values.element_size())
        self.layout = Layout(placements=tuple(placements), storage_nbytes=(end,))
        self.rebind(Memory([torch.zeros(end, dtype=torch.uint8, device=self.device)], is_arena=True))

    def rebind(self, memory: Memory) -> None:
        if tuple(s.numel() for s in memory.storages) != self.layout.storage_nbytes:
            raise InvalidInput("the new memory has other storages than the old one")
        self.memory = memory
        self._is_mirror = True
        self._views = [
            memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides) for p in self.layout.placements
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        now = [self._local_now(name) for name in self._forms]
        if self._is_mirror:
            if self._views:
                torch._foreach_copy_(self._views, [now[i] for i in self._held_at])
        elif _addresses(now) != self._addresses:
            raise StateError(
                "parameters of the module were moved since connect()",
                hint="Do not call .to() or replace .data of a published module; connect again",
            )
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _local_now(self, name: str) -> torch.Tensor:
        before, value = self._forms[name], self._tensors.get(name)
        if value is None:
            raise StateError(f"{name!r} was published at connect() and is gone")
        local = local_of(value).detach()
        if _form(value, local) != before:
            raise StateError(f"{name!r} was {before} at connect() and is {_form(value, local)}")
        return local


def _addresses(values: Sequence[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, values))


def _form(value: torch.Tensor, local: torch.Tensor) -> tuple[object, ...]:
    """What may not change between rounds."""
    return local.dtype, tuple(value.shape), tuple(local.shape), tuple(getattr(value, "placements", ()))


def _is_held(part: Part) -> bool:
    """Empty shards of tensors that have elements are held by nobody."""
    return part.values.numel() > 0 or 0 in part.shape


def _placement(name: str, part: Part, storage: int, offset: int, strides: tuple[int, ...]) -> Placement:
    region = Region(name=name, offsets=part.offsets, sizes=tuple(part.values.shape))
    return Placement(region=region, dtype=name_of(part.values.dtype), storage=storage, offset=offset, strides=strides)
