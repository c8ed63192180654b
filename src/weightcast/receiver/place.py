"""Place: where what a worker keeps beside its live weights lies, and whether there is room for it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightcast.errors import ShadowError
from weightcast.receiver.base import LiveModel
from weightcast.room import host_room_nbytes

CHECK_HEADROOM = 1.1
"""A shadow is allocated only where this many times its size is free: the engine needs room to breathe."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a staged copy lies: on the device of the live weights, or in page-locked memory of the host. ``copies`` is 1, or 2 where
    two copies take turns and a commit copies out of one of them."""

    device: torch.device
    copies: int = 1

    def __str__(self) -> str:
        where = str(self.device) if self.device.type == "cuda" else "host memory"
        return f"{where}, two copies" if self.copies > 1 else where


def new_storage(nbytes: int, place: Place | None, model: LiveModel) -> torch.Tensor:
    """Allocate memory at a place. None stands for the device of the live weights."""
    device = model.device if place is None else place.device
    pinned = device.type == "cpu" and model.device.type == "cuda"
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def free_nbytes(device: torch.device) -> int:
    """Return how many bytes a shadow may take on a device. Raises ShadowError where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps for itself, such as the shadow of the trainer before this one, would count as taken.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    room = host_room_nbytes()
    if room is None:
        raise ShadowError("cannot tell how much memory is free", hint="Ask for mode in_place")
    return room


def give_back(device: torch.device) -> None:
    """Return unused GPU memory and unused page-locked memory to the system, so that other processes can have them, and not torch alone."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
    if empty_host_cache is not None:
        empty_host_cache()


def choose_place(model: LiveModel, areas: Sequence[int], copies: int, *, host: bool) -> Place:
    """Return the best place that has room for a copy of the live weights and for areas of these sizes.

    ``host`` allows page-locked host memory for weights on a GPU. Parameters that can be rebound need one copy only. Raises ShadowError
    where no place has room.
    """
    nbytes, device = model.memory().nbytes, model.device
    free = max(0, free_nbytes(device) - model.asleep_nbytes)
    processing = model.processing
    more = [*areas] if processing is None else [*areas, processing.nbytes, processing.processed_nbytes]
    scratch = 0 if processing is None else processing.scratch_nbytes
    beside = sum(more) + model.derived_nbytes + scratch
    for count in range(1 if model.relocatable else copies, 0, -1):
        if (count * nbytes + beside) * CHECK_HEADROOM <= free:
            return Place(device, count)
    if device.type == "cuda" and host:
        sizes = [*(storage.numel() for storage in model.memory().storages), *more]
        needed = sum(_pinned_nbytes(size) for size in sizes)
        in_host = free_nbytes(torch.device("cpu"))
        if needed * CHECK_HEADROOM <= in_host and scratch <= free:
            return Place(torch.device("cpu"))
        raise ShadowError(
            f"a staged copy takes {nbytes + sum(more)} bytes; {free} are free on {device}, {in_host} in the host's memory",
            hint="Ask for mode in_place",
        )
    raise ShadowError(
        f"a staged copy takes {nbytes + beside} bytes, {free} are free on {device}", hint="Ask for mode in_place"
    )


def _pinned_nbytes(nbytes: int) -> int:
    """What torch takes for page-locked memory: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
