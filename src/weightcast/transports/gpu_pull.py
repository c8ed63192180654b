"""A pull by a GPU: a plan replayed out of a trainer's memory that one GPU reaches, on a stream of its own, with deadlines.

How the memory is reached (mapped, registered) is the transport's business; tables and kernels are made once for each destination.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from weightcast.cuda.wait import new_event, new_stream, wait_event, wait_queued
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, parts_of
from weightcast.transports.recent import Recent

if TYPE_CHECKING:
    from weightcast.content.proven_on_gpu import ProvenReplay
    from weightcast.cuda.replay import CudaReplay

logger = logging.getLogger(__name__)

DRAIN_S = 5.0
"""How long closing waits for copies that are still running."""


class Reached(Protocol):
    """A trainer's storages as memory of one GPU of this process."""

    @property
    def memory(self) -> Memory: ...

    def close(self) -> None:
        """Undo what made the memory reachable; no copy runs any more."""


class GpuPull:
    """The worker's half of a transport whose GPU reads the trainer's memory itself. Not thread-safe."""

    def __init__(
        self,
        copies: Sequence[Copy],
        reach: Callable[[torch.device, Deadline], Reached],
        check: Callable[[], None],
        what: str,
    ) -> None:
        """``reach`` makes the trainer's memory reachable for a GPU; ``check`` is called while copies run and may raise. ``what`` names
        the copy in errors."""
        self._reach, self._check, self._what = reach, check, what
        self._parts = parts_of(copies)
        self._reached: Reached | None = None
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None
        self._replays: Recent[CudaReplay] = Recent(parts=len(self._parts))
        self._proven: Recent[ProvenReplay] = Recent(parts=len(self._parts))
        self._devices: Recent[torch.device] = Recent()
        self.has_written = False

    def connect(self, deadline: Deadline) -> None:
        """Reach the memory for the current GPU; ``receive`` does so anew where its memory lies on another."""
        self._source_on(torch.device("cuda", torch.cuda.current_device()), deadline)

    def warm_up(self, memory: Memory, manifest: Manifest, deadline: Deadline) -> None:
        """Build the tables of the memory's replay and compile its kernels, partly on the current stream."""
        source = self._source_for(memory, deadline)
        for part in self._parts:
            if memory.gpu is not None:
                self._replay_for(memory, source, part).warm_up()
            else:
                self._proven_for(memory, source, manifest, part).warm_up()

    def receive(self, memory: Memory, deadline: Deadline, part: int) -> int:
        """Copy a part into ``memory``; the bytes are there when this returns."""
        self.has_written = False
        source = self._source_for(memory, deadline)
        return self._run(self._replay_for(memory, source, part), deadline)

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int
    ) -> tuple[int, int | None]:
        """``receive``, and the digest of what was written; None for memory of the host: what was written there would be read back over
        the bus, which the digest alone does better."""
        if memory.gpu is not None:
            return self.receive(memory, deadline, part), None
        self.has_written = False
        source = self._source_for(memory, deadline)
        replay = self._proven_for(memory, source, manifest, part)
        nbytes = self._run(replay, deadline)
        with torch.cuda.stream(self._stream):
            return nbytes, replay.total()

    def close(self) -> None:
        """Wait for what still runs and let go of the trainer's memory; idempotent."""
        reached, stream = self._reached, self._stream
        self._reached = self._stream = self._device = None
        if reached is None or stream is None:
            return
        try:
            # Copies of an aborted round may still be running; memory under a running copy must stay reachable.
            wait_queued(stream, Deadline(DRAIN_S), "the last copy")
        except (WeightcastError, RuntimeError) as error:
            logger.warning("the trainer's memory stays mapped: %s", error)
        else:
            reached.close()
        self._replays.clear()
        self._proven.clear()

    def _run(self, replay: CudaReplay | ProvenReplay, deadline: Deadline) -> int:
        """Queue the copies and wait for them."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self._device))
        done = new_event()
        self.has_written = True
        with torch.cuda.stream(stream):
            nbytes = replay.run()
            done.record(stream)
        wait_event(done, deadline, self._what, self._check)
        return nbytes

    def _replay_for(self, memory: Memory, source: Memory, part: int) -> CudaReplay:
        # Triton comes with torch for CUDA only; without a GPU transports still have to say what they lack.
        from weightcast.cuda.replay import CudaReplay

        def compiled() -> CudaReplay:
            assert self._device is not None
            return CudaReplay(self._parts[part], source, memory, self._device)

        return self._replays.get((memory.number, part), compiled)

    def _proven_for(self, memory: Memory, source: Memory, manifest: Manifest, part: int) -> ProvenReplay:
        from weightcast.content.proven_on_gpu import ProvenReplay

        def compiled() -> ProvenReplay:
            assert self._device is not None
            return ProvenReplay(self._parts[part], source, memory, manifest, self._device)

        return self._proven.get((memory.number, part), compiled)

    def _source_for(self, memory: Memory, deadline: Deadline) -> Memory:
        """The trainer's memory for the GPU that ``memory`` lies on."""
        return self._source_on(self._devices.get(memory.number, lambda: self._device_of(memory)), deadline)

    def _device_of(self, memory: Memory) -> torch.device:
        if memory.gpu is not None:
            return memory.gpu
        wanted = {copy.dst_storage for copies in self._parts.values() for copy in copies}
        devices = {memory.storages[number].device for number in wanted}
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            raise InvalidInput(f"a GPU pulls into the memory of one GPU, not {sorted(map(str, devices))}")
        return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())

    def _source_on(self, device: torch.device, deadline: Deadline) -> Memory:
        if self._reached is None or self._device != device:
            self.close()
            self._reached, self._device, self._stream = self._reach(device, deadline), device, new_stream(device)
        return self._reached.memory
