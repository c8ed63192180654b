"""Where a round's bytes land: the live storages or a shadow of them, and the staging area of the loader's tensors."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch

from weightcast.cuda.wait import wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import ShadowError
from weightcast.layout import Layout, Placement, contiguous_strides, image_layout
from weightcast.manifest import Manifest
from weightcast.memory import Memory
from weightcast.receiver.base import LiveModel
from weightcast.receiver.exchange import Exchange, Landing
from weightcast.room import host_room_nbytes

logger = logging.getLogger(__name__)

CHECK_HEADROOM = 1.1
"""A shadow is allocated only where this many times its size is free: the engine needs room to breathe."""


FILL_TIMEOUT_S = 60.0


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
    """Memory that a shadow may take on a device; raises ShadowError where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps for itself, such as the shadow of the trainer before this one, would count as taken.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    room = host_room_nbytes()
    if room is None:
        raise ShadowError("cannot tell how much memory is free", hint="Ask for mode in_place")
    return room


@dataclass(frozen=True, slots=True)
class Place:
    """Where a staged copy lies: beside the live weights, or in page-locked memory of the host. ``copies`` is 1, or 2 where a
    commit takes one of two in turn."""

    device: torch.device
    copies: int = 1

    def __str__(self) -> str:
        where = str(self.device) if self.device.type == "cuda" else "host memory"
        return f"{where}, two copies" if self.copies > 1 else where


def choose_place(model: LiveModel, area_nbytes: int, copies: int, *, host: bool) -> Place:
    """The best place that has room; ``host`` allows page-locked memory of the host for weights on a GPU.

    Parameters that can be rebound need one copy only. Raises ShadowError where nothing has room.
    """
    nbytes, device = model.memory().nbytes, model.device
    free = free_nbytes(device)
    beside = area_nbytes + model.prepare_nbytes
    for count in range(1 if model.relocatable else copies, 0, -1):
        if (count * nbytes + beside) * CHECK_HEADROOM <= free:
            return Place(device, count)
    if device.type == "cuda" and host:
        sizes = [*(storage.numel() for storage in model.memory().storages), area_nbytes]
        needed = sum(_pinned_nbytes(size) for size in sizes)
        in_host = free_nbytes(torch.device("cpu"))
        if needed * CHECK_HEADROOM <= in_host:
            return Place(torch.device("cpu"))
        raise ShadowError(
            f"a staged copy takes {nbytes + area_nbytes} bytes; {free} are free on {device}, {in_host} in the host's memory",
            hint="Ask for mode in_place",
        )
    raise ShadowError(
        f"a staged copy takes {nbytes + beside} bytes, {free} are free on {device}", hint="Ask for mode in_place"
    )


def _pinned_nbytes(nbytes: int) -> int:
    """What torch takes for page-locked memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


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
        place: Place | None,
        loaded: LoadedTensors | None = None,
    ) -> None:
        self._model = model
        self._manifest = manifest
        self.place = place
        self._layout = layout
        self.staged = place is not None
        self._relocates = place is not None and model.relocatable and place.device == model.device
        self._num_live = len(model.memory().storages)
        self._has_staging = bool(layout.through_loader)
        self._memories: dict[tuple[int, ...], Memory] = {}
        try:
            self._area = self._allocate_area()
            self._loaded_area: torch.Tensor | None = None
            self._before: torch.Tensor | None = None
            self._shadows = [self._shadow_of(model.memory()) for _ in range(place.copies)] if place else []
        except (RuntimeError, MemoryError) as error:
            raise ShadowError(f"no memory for the staged copy: {error}", hint="Ask for mode in_place") from error
        # Rounds are received on another stream than the one that filled these.
        self.settle(Deadline(FILL_TIMEOUT_S))
        self._memory = self._combine()
        self._ways: dict[tuple[int, int], Exchange | Landing] = {}
        self._compiling = threading.Lock()
        self._landed: Landing | None = None
        if loaded is not None and self._area is not None and loaded.layout_digest == self._layout_digest():
            self._loaded_area = loaded.area

    @property
    def shadow_nbytes(self) -> int:
        """Bytes taken beside the live weights."""
        areas = sum(area.numel() for area in (self._area, self._loaded_area) if area is not None)
        return sum(shadow.nbytes for shadow in self._shadows) + areas

    def memory(self) -> Memory:
        """Where the next round's bytes go."""
        if not self.staged and not self._is_current():
            self._memory = self._combine()
        return self._memory

    @property
    def known_memory(self) -> Memory:
        """``memory()`` when it was last asked for, without a look at the engine: for threads beside it."""
        return self._memory

    def compile(self) -> None:
        """Have ready what ``swap`` runs, beside the running engine: the first one would compile it while the engine waits."""
        if self._shadows and self._num_live and not self._relocates:
            live = self._model.memory()
            for shadow in tuple(self._shadows):
                self._way(live, shadow).prepare()

    def prepare(self) -> None:
        """All bytes are staged: have the model get ready for ``swap``, beside the running engine."""
        if self._relocates:
            self._model.prepare(self._shadows[0])

    def swap(self) -> None:
        """Make the staged direct landings live and keep what was: in the shadow afterwards, or in the other one of two.

        Twice is nothing. On a GPU the work is queued on the current stream; ``settle`` waits for it.
        """
        if not self._shadows or not self._num_live:
            return
        live, shadow = self._model.memory(), self._shadows[0]
        if self._relocates:
            self._model.rebind(shadow)
            self._shadows = [live]
        else:
            way = self._way(live, shadow)
            way.run()
            if isinstance(way, Landing):
                self._landed = way
                self._shadows.reverse()
        self._memory = self._combine()

    def _way(self, live: Memory, shadow: Memory) -> Exchange | Landing:
        """What makes a shadow live, compiled once: by ``compile`` on another thread than the engine's, or by ``swap``."""
        key = (live.number, shadow.number)
        with self._compiling:
            if key not in self._ways:
                in_turn = len(self._shadows) > 1
                direct = self._direct()
                self._ways[key] = (
                    Landing(live, shadow, direct, self._manifest) if in_turn else Exchange(live, shadow, direct)
                )
            return self._ways[key]

    def close(self) -> None:
        """Give up everything beside the live weights; only ``place`` and ``staged`` can be asked for afterwards."""
        self._shadows.clear()
        self._memories.clear()
        self._ways.clear()
        self._landed = None
        self._area = self._loaded_area = self._before = None
        self._memory = Memory([])

    def settle(self, deadline: Deadline) -> None:
        """Return when a swap is done on the GPU, too."""
        if self._model.device.type == "cuda":
            wait_stream(self._model.device, deadline, "making the staged weights live")

    def landed_digest(self) -> int | None:
        """The digest of what the last swap made live, where it was taken on the way; otherwise None."""
        return None if self._landed is None or self._has_staging else self._landed.total()

    @property
    def moves(self) -> bool:
        """True: a swap makes the very storages live that were staged, so their digest is that of what is live."""
        return self._relocates

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
            if self._before is None:
                free = self._new_storage(self._area.numel()).zero_()
                self.settle(Deadline(FILL_TIMEOUT_S))
            else:
                free = self._before
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

    def _allocate_area(self) -> torch.Tensor | None:
        return self._new_storage(self._layout.storage_nbytes[-1]).zero_() if self._has_staging else None

    def _new_storage(self, nbytes: int) -> torch.Tensor:
        """Memory of the shadow's place; an in-place target's staging area lies with the live weights."""
        device = self._model.device if self.place is None else self.place.device
        pinned = device.type == "cpu" and self._model.device.type == "cuda"
        return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)

    def _shadow_of(self, live: Memory) -> Memory:
        # A copy, not empty memory: bytes that no landing covers must be right after a swap by rebinding.
        return self._new_memory([self._new_storage(s.numel()).copy_(s) for s in live.storages], live.is_arena)

    def _new_memory(self, storages: list[torch.Tensor], is_arena: bool) -> Memory:
        on_host = self._model.device.type == "cuda" and any(not storage.is_cuda for storage in storages)
        return Memory(storages, is_arena=is_arena, gpu=self._model.device if on_host else None)

    def _combine(self) -> Memory:
        direct = self._shadows[0] if self._shadows else self._model.memory()
        return self._known([*direct.storages] + ([self._area] if self._area is not None else []))

    def _known(self, storages: list[torch.Tensor]) -> Memory:
        """The memory of some storages; the same object whenever they come round again, so that what transports and
        digests compiled for it is found."""
        key = tuple(storage.data_ptr() for storage in storages)
        if key not in self._memories:
            live = self._model.memory()
            self._memories[key] = self._new_memory(storages, live.is_arena or not live.storages)
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
