"""Movers: how values go between the buffers of buckets, which lie in the host's memory, and the memory of weights, wherever that lies.

In the host's memory sockets and files reach weights themselves, and only what is strided or cast is copied. A GPU's memory is reached by
that GPU: its kernels copy into page-locked buffers and out of them, on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from weightcast.cuda.host import locked_buffer
from weightcast.cuda.wait import new_event, new_stream, wait_event
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput
from weightcast.layout.memory import Memory
from weightcast.plan import Copy
from weightcast.plan.replay import Replay
from weightcast.transports.buckets import Bucket

Step = Callable[[Deadline], None]
"""Copies values; they are there when it returns."""


class Buffer(NamedTuple):
    """Host memory that buckets travel in, and the same memory as whatever copies weights sees it."""

    host: torch.Tensor
    near: torch.Tensor


class Mover(Protocol):
    """Copies between buffers and one memory. Steps may run on several threads at once."""

    reaches_weights: bool
    """Whether sockets and files read and write the weights' own memory."""

    def buffers(self, buckets: Sequence[Bucket], count: int) -> list[Buffer]: ...

    def begin(self) -> None:
        """A transfer begins on this thread: its steps come after what the thread's stream was given before."""

    def step(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> Step: ...

    def run(self, work: Callable[[], object], deadline: Deadline) -> None:
        """Do work on the weights' device; it is done when this returns."""


class HostMover:
    """For weights in the host's memory."""

    reaches_weights = True

    def buffers(self, buckets: Sequence[Bucket], count: int) -> list[Buffer]:
        buffers = [torch.empty(n, dtype=torch.uint8, device="cpu") for n in _sizes(buckets, count)]
        return [Buffer(buffer, buffer) for buffer in buffers]

    def begin(self) -> None:
        pass

    def step(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> Step:
        replay = Replay(copies, src, dst)

        def run(deadline: Deadline) -> None:
            replay.run()

        return run

    def run(self, work: Callable[[], object], deadline: Deadline) -> None:
        work()


class GpuMover:
    """For weights on one GPU. ``check`` is called while copies run and may raise."""

    reaches_weights = False

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        self._device, self._check = device, check
        self._stream = new_stream(device)

    def buffers(self, buckets: Sequence[Bucket], count: int) -> list[Buffer]:
        return [Buffer(*locked_buffer(nbytes, self._device)) for nbytes in _sizes(buckets, count)]

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def step(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> Step:
        # Triton comes with torch for CUDA only; without a GPU transports still have to say what they lack.
        from weightcast.cuda.replay import CudaReplay

        replay = CudaReplay(copies, src, dst, self._device)

        def run(deadline: Deadline) -> None:
            self.run(replay.run, deadline)

        return run

    def run(self, work: Callable[[], object], deadline: Deadline) -> None:
        done = new_event()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work()
            done.record(self._stream)
        wait_event(done, deadline, "copying between a GPU and a page-locked buffer", self._check)


def mover_for(memory: Memory, copies: Sequence[Copy], check: Callable[[], None], *, is_source: bool) -> Mover:
    """The mover for the side of some copies that lies in ``memory``; InvalidInput where it lies on several devices."""
    numbers = {copy.src_storage if is_source else copy.dst_storage for copy in copies if copy.nbytes}
    devices = {memory.storages[number].device for number in numbers}
    if len(devices) > 1:
        raise InvalidInput(f"weights on several devices: {sorted(map(str, devices))}", field="device")
    device = devices.pop() if devices else torch.device("cpu")
    return GpuMover(device, check) if device.type == "cuda" else HostMover()


def _sizes(buckets: Sequence[Bucket], count: int) -> list[int]:
    """As many buffers as can be in use, each as large as the largest bucket."""
    return [max((bucket.nbytes for bucket in buckets), default=0)] * min(count, len(buckets))
