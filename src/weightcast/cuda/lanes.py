"""Lanes: the buffers that buckets travel in, and the order of work in them: what one holds is used up before it is filled again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from weightcast.cuda.wait import new_event, new_stream, wait_queued
from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Copy

if TYPE_CHECKING:
    from weightcast.cuda.replay import CudaReplay

IN_FLIGHT = 2
"""Buffers: one is packed or unpacked while the other travels."""
AHEAD = 8
"""Steps that are queued before the host waits for the GPU: it takes longer to queue a small bucket than a fast link to carry it,
and what is queued has to be drained when a transfer breaks."""


class Lanes:
    """``IN_FLIGHT`` buffers of ``nbytes`` on one GPU, used in turns by numbered steps, and the stream that packs or unpacks beside
    the one that sends or receives. Steps wait for each other on the GPU."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(IN_FLIGHT)]
        self._through: dict[int, torch.cuda.Event] = {}
        self.side = new_stream(device)

    def buffer(self, number: int) -> torch.Tensor:
        """The buffer of step ``number``."""
        return self._buffers[number % IN_FLIGHT]

    def packer(self, number: int, copies: Sequence[Copy], memory: Memory) -> CudaReplay:
        """The copies from ``memory`` into the buffer of a step, compiled once."""
        return _replay(copies, memory, Memory([self.buffer(number)]), self._device)

    def unpacker(self, number: int, copies: Sequence[Copy], memory: Memory) -> CudaReplay:
        """The copies from the buffer of a step into ``memory``, compiled once."""
        return _replay(copies, Memory([self.buffer(number)]), memory, self._device)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Around a new transfer: ``side`` is this thread's current stream. It waits for what was queued on the one before."""
        self._through.clear()
        self.side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(self.side):
            yield

    def take(self, number: int, stream: torch.cuda.Stream) -> torch.cuda.Event | None:
        """Have the stream wait until the step before, which used the buffer of this one, is through. What it returns the host
        has to wait for first, if anything: the step ``AHEAD`` of this one."""
        if (free := self._through.get(number - IN_FLIGHT)) is not None:
            stream.wait_event(free)
        return self._through.pop(number - AHEAD, None)

    def mark(self, number: int, stream: torch.cuda.Stream) -> None:
        """The step is through once what is queued on the stream is done."""
        event = self._through[number] = new_event()
        event.record(stream)

    def drain(self, deadline: Deadline) -> None:
        """Return when nothing of a transfer that broke is queued any more; DeadlineExceeded when it does not end."""
        wait_queued(self.side, deadline, "what is left of a transfer that broke")


def _replay(copies: Sequence[Copy], src: Memory, dst: Memory, device: torch.device) -> CudaReplay:
    # Triton comes with torch for CUDA only; without a GPU the transports still have to say what they lack.
    from weightcast.cuda.replay import CudaReplay

    return CudaReplay(copies, src, dst, device)
