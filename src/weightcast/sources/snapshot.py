"""Snapshot: a source whose values are copied into memory of its own, so that a round goes on while the user's tensors change.

    taken       values are the user's of that moment, and stay: ``fill``, ``refresh`` and the checks do nothing
    put down    ``fill`` takes them anew

The copy is queued on the caller's stream of the GPU: what the caller queues next waits for it there, and the caller does not.
"""

from __future__ import annotations

import torch

from weightcast.cuda.wait import new_event, wait_event
from weightcast.deadline import Deadline
from weightcast.errors import StateError, WeightsMoved
from weightcast.layout.memory import Memory
from weightcast.room import host_room_nbytes
from weightcast.sources.arenas import is_covered, one_arena
from weightcast.sources.base import Source, wait_for_stream

GPU_SHARE_LEFT = 16
"""A snapshot lies on the GPU where this part of the GPU's memory stays free beside it."""
WAIT_S = 60.0
"""How long a copy is waited for where no call's deadline is known."""
HINT = "Publish without wait=False, which needs no copy; or let the trainer take less memory"


class Snapshot(Source):
    """The values of another source at the moment at which they were taken. A source that copies its values anyway is not copied again.

    Args:
        inner: the source; it is closed with the snapshot.
        may_be_on_host: whether weights of a GPU may be copied to the host where the GPU has no room.
    """

    is_copied = True
    is_private = True

    def __init__(self, inner: Source, *, may_be_on_host: bool = True) -> None:
        self.inner, self.may_be_on_host = inner, may_be_on_host
        self.manifest, self.dtype = inner.manifest, inner.dtype
        self._is_taken = False
        self._ready: torch.cuda.Event | None = None
        self._starts: list[int] = []
        if inner.is_private:
            self._take_over()
            return
        self._starts, self.layout = one_arena(inner.layout)
        self.device = self._place(inner.device, may_be_on_host)
        arena = self._new_arena()
        self.rebind(Memory([arena], is_arena=is_covered(inner.layout, self.layout)))

    def _take_over(self) -> None:
        self.layout, self.memory, self.device = self.inner.layout, self.inner.memory, self.inner.device

    def _place(self, device: torch.device, may_be_on_host: bool) -> torch.device:
        """Where there is room; StateError where there is none."""
        nbytes = self.layout.storage_nbytes[0]
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free - nbytes >= total // GPU_SHARE_LEFT:
                return device
            if not may_be_on_host:
                raise StateError(f"{device} has no room for a snapshot of {nbytes} bytes ({free} are free)", hint=HINT)
        room = host_room_nbytes()
        if room is not None and room < nbytes:
            raise StateError(f"this host has no room for a snapshot of {nbytes} bytes ({room} are free)", hint=HINT)
        return torch.device("cpu")

    def _new_arena(self) -> torch.Tensor:
        return torch.zeros(self.layout.storage_nbytes[0], dtype=torch.uint8, device=self.device)

    @property
    def own_nbytes(self) -> int:
        return self.inner.own_nbytes + (self.memory.nbytes if self._starts else 0)

    @property
    def is_taken(self) -> bool:
        """Whether the values of a round are here, and stay."""
        return self._is_taken

    def consolidate(self) -> None:
        if not self._starts:
            self.inner.consolidate()
            self._take_over()

    def rebind(self, memory: Memory) -> None:
        if not self._starts:
            self.inner.rebind(memory)
            self._take_over()
            return
        self.memory = memory
        ends = [start + nbytes for start, nbytes in zip(self._starts, self.inner.layout.storage_nbytes, strict=True)]
        self._parts = [memory.storages[0][start:end] for start, end in zip(self._starts, ends, strict=True)]

    # -- a round

    def take(self, deadline: Deadline) -> None:
        """Have the user's values of this moment, until ``put_down``. Raises what the source's own checks raise."""
        self._gather(deadline)
        self._is_taken = True

    def put_down(self) -> None:
        """Let the next ``fill`` take values anew."""
        self._is_taken, self.held_s = False, None

    def _gather(self, deadline: Deadline) -> None:
        self.inner.deadline = deadline
        try:
            self.inner.gather()
        except WeightsMoved:
            if not self.inner.follow():
                raise
            self.inner.gather()
        self.inner.check()
        if self._starts:
            self._copy()
        elif self.inner.memory is not self.memory:
            self._take_over()

    @torch.no_grad()
    def _copy(self) -> None:
        storages = self.inner.memory.storages
        if self.inner.device == self.device:
            torch._foreach_copy_(self._parts, list(storages))
        else:
            for part, storage in zip(self._parts, storages, strict=True):
                part.copy_(storage, non_blocking=True)
        if self.device.type == "cuda":
            self._ready = new_event()
            self._ready.record(torch.cuda.current_stream(self.device))
        else:
            wait_for_stream(self.inner.device)

    def _settle(self) -> None:
        """Return when what was taken is there."""
        if self._ready is not None:
            wait_event(self._ready, self.deadline or Deadline(WAIT_S), "copying a snapshot", lambda: None)
            self._ready = None
        elif not self._starts:
            wait_for_stream(self.inner.device)

    def refresh(self) -> None:
        if not self._is_taken:
            self._gather(self.deadline or Deadline(WAIT_S))
        self._settle()
        self.check()

    def fill(self) -> None:
        if not self._is_taken:
            self._gather(self.deadline or Deadline(WAIT_S))
        self._settle()

    def check(self) -> None:
        if not self._is_taken:
            self.inner.check()

    def check_form(self) -> None:
        if not self._is_taken:
            try:
                self.inner.check_form()
            except WeightsMoved:
                if not self.inner.follow():
                    raise

    def close(self) -> None:
        self.inner.close()
        super().close()
        self._parts = []
