"""Where a round's bytes land: the live storages or a shadow of them, and the staging area of the loader's tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from weightcast.errors import ShadowError
from weightcast.layout import Layout, Placement, contiguous_strides, image_layout
from weightcast.manifest import Manifest
from weightcast.memory import Memory
from weightcast.receiver.base import LiveModel
from weightcast.receiver.exchange import Exchange

CHECK_HEADROOM = 1.1
"""A shadow is allocated only where this many times its size is free: the engine needs room to breathe."""


def with_staging(layout: Layout, manifest: Manifest) -> Layout:
    """The engine's landings plus one storage in which whole tensors wait for the engine's loader."""
    if not layout.through_loader:
        return layout
    staging = image_layout(manifest, layout.through_loader)
    number = len(layout.storage_nbytes)
    moved = tuple(msgspec.structs.replace(placement, storage=number) for placement in staging.placements)
    return msgspec.structs.replace(
        layout,
        placements=layout.placements + moved,
        storage_nbytes=layout.storage_nbytes + staging.storage_nbytes,
    )


def free_nbytes(device: torch.device) -> int:
    """Memory that a shadow may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise ShadowError("cannot tell how much memory is free", hint="Ask for mode in_place")


@dataclass(frozen=True, slots=True)
class LoadedTensors:
    """What went through the engine's loader and is live: the way back to it outlives a trainer's stay."""

    layout_digest: bytes
    area: torch.Tensor


class Target:
    """The memory that one round writes, over the layout that ``with_staging`` gave.

    ``memory()`` numbers its storages as that layout does. In a staged target they are a shadow, exchanged with the live ones
    by ``swap``; in an in-place target they are the live ones.
    """

    def __init__(
        self,
        model: LiveModel,
        manifest: Manifest,
        layout: Layout,
        *,
        staged: bool,
        loaded: LoadedTensors | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self.staged = staged
        self._num_live = len(model.memory().storages)
        self._has_staging = bool(layout.through_loader)
        self._memories: dict[tuple[int, ...], Memory] = {}
        if staged:
            self._check_room()
        try:
            self._area = self._allocate_area()
            self._loaded_area: torch.Tensor | None = None
            self._before: torch.Tensor | None = None
            self._shadow = self._shadow_of(model.memory()) if staged else None
        except (RuntimeError, MemoryError) as error:
            raise ShadowError(f"no memory for the staged copy: {error}", hint="Ask for mode in_place") from error
        self._memory = self._combine()
        self._swap: Exchange | None = None
        if loaded is not None and self._area is not None and loaded.layout_digest == self._layout_digest():
            self._loaded_area = loaded.area

    @property
    def shadow_nbytes(self) -> int:
        """Bytes taken beside the live weights."""
        shadow = self._shadow.nbytes if self._shadow is not None else 0
        return shadow + sum(area.numel() for area in (self._area, self._loaded_area) if area is not None)

    def memory(self) -> Memory:
        """Where the next round's bytes go."""
        if not self.staged and not self._is_current():
            self._memory = self._combine()
        return self._memory

    def swap(self) -> None:
        """Exchange shadow and live direct landings: what was live is in the shadow afterwards. Twice is nothing."""
        if self._shadow is None or not self._num_live:
            return
        live = self._model.memory()
        if self._model.relocatable:
            self._model.rebind(self._shadow)
            self._shadow = live
        else:
            if self._swap is None:
                self._swap = Exchange(live, self._shadow, self._direct())
            self._swap.run()
        self._memory = self._combine()

    @property
    def moves(self) -> bool:
        """True: a swap makes the very storages live that were staged, so their digest is that of what is live."""
        return self.staged and self._model.relocatable

    def loader_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The staged tensors that go through the engine's loader."""
        return self._tensors(self._area)

    def previous_loader_tensors(self) -> Iterator[tuple[str, torch.Tensor]] | None:
        """Those that are live, or were before the loader began on the staged ones; None when nobody has them."""
        return None if self._loaded_area is None else self._tensors(self._loaded_area)

    def keep_loader_tensors(self) -> None:
        """What is staged for the loader is live now; the version before it stays until the next round overwrites it."""
        if self._area is not None:
            self._before = self._loaded_area
            free = self._before if self._before is not None else torch.zeros_like(self._area)
            self._area, self._loaded_area = free, self._area
            self._memory = self._combine()

    def take_back_loader_tensors(self) -> None:
        """The version before the last ``keep_loader_tensors`` counts as live again."""
        if self._area is not None:
            assert self._loaded_area is not None
            self._area, self._loaded_area, self._before = self._loaded_area, self._before, None
            self._memory = self._combine()

    def loaded(self) -> LoadedTensors | None:
        """What is live through the loader, for the target of the next trainer."""
        return None if self._loaded_area is None else LoadedTensors(self._layout_digest(), self._loaded_area)

    def _layout_digest(self) -> bytes:
        own = [placement for placement in self._layout.placements if placement.storage == self._num_live]
        return hashlib.sha256(msgspec.msgpack.encode(own)).digest()

    def live_memory(self) -> Memory:
        """Live direct landings, and the loader's tensors as they were given to it."""
        area = self._loaded_area if self._loaded_area is not None else self._area
        return self._known([*self._model.memory().storages] + ([area] if area is not None else []))

    def _check_room(self) -> None:
        needed = self._model.memory().nbytes + (self._layout.storage_nbytes[-1] if self._has_staging else 0)
        free = free_nbytes(self._model.device)
        if needed * CHECK_HEADROOM > free:
            raise ShadowError(f"a staged copy takes {needed} bytes, {free} are free", hint="Ask for mode in_place")

    def _allocate_area(self) -> torch.Tensor | None:
        if not self._has_staging:
            return None
        return torch.zeros(self._layout.storage_nbytes[-1], dtype=torch.uint8, device=self._model.device)

    @staticmethod
    def _shadow_of(live: Memory) -> Memory:
        # A copy, not empty memory: bytes that no landing covers must be right after a swap by rebinding.
        return Memory([storage.clone() for storage in live.storages], is_arena=live.is_arena)

    def _combine(self) -> Memory:
        direct = self._shadow if self._shadow is not None else self._model.memory()
        return self._known([*direct.storages] + ([self._area] if self._area is not None else []))

    def _known(self, storages: list[torch.Tensor]) -> Memory:
        """The memory of some storages; the same object whenever they come round again, so that what transports and
        digests compiled for it is found."""
        key = tuple(storage.data_ptr() for storage in storages)
        if key not in self._memories:
            live = self._model.memory()
            self._memories[key] = Memory(storages, is_arena=live.is_arena or not live.storages)
        return self._memories[key]

    def _is_current(self) -> bool:
        live = self._model.memory().storages
        return all(mine is theirs for mine, theirs in zip(self._memory.storages, live, strict=False))

    def _direct(self) -> list[Placement]:
        return [placement for placement in self._layout.placements if placement.storage < self._num_live]

    def _tensors(self, area: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        if area is None:
            return
        memory = Memory([area])
        for placement in self._layout.placements:
            if placement.storage == self._num_live:
                sizes = placement.region.sizes
                yield (
                    placement.region.name,
                    memory.view(0, placement.dtype, placement.offset, sizes, contiguous_strides(sizes)),
                )
