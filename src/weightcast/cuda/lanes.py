"""Lanes: the buffers that buckets travel in, and the order of work in them: what one holds is used up before it is filled again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weightcast.cuda.wait import new_event, new_stream
from weightcast.memory import Memory
from weightcast.plan import Copy

if TYPE_CHECKING:
    from weightcast.cuda.replay import CudaReplay

IN_FLIGHT = 2
"""Buffers: one is packed or unpacked while the other travels."""


class Lanes:
    """``IN_FLIGHT`` buffers of ``nbytes`` on one GPU, used in turns, and the stream that packs or unpacks beside the one that
    sends or receives."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(IN_FLIGHT)]
        self._free: list[torch.cuda.Event | None] = [None] * IN_FLIGHT
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

    def free(self, number: int) -> torch.cuda.Event | None:
        """When the step before, which used the same buffer, is through; None for the first ones."""
        return self._free[number % IN_FLIGHT]

    def mark_free(self, number: int, stream: torch.cuda.Stream) -> None:
        """The buffer of a step is free once what is queued on the stream is done."""
        event = new_event()
        event.record(stream)
        self._free[number % IN_FLIGHT] = event


def _replay(copies: Sequence[Copy], src: Memory, dst: Memory, device: torch.device) -> CudaReplay:
    # Triton comes with torch for CUDA only; without a GPU the transports still have to say what they lack.
    from weightcast.cuda.replay import CudaReplay

    return CudaReplay(copies, src, dst, device)
