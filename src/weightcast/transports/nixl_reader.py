"""A worker's reads through NIXL: the buckets that it reads into, its prepared lists and reads, and what becomes of reads that do not end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from weightcast.cuda.wait import wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.layout.memory import Memory
from weightcast.transports.movers import Step, mover_for
from weightcast.transports.nixl_agent import Agent, Extent, Read
from weightcast.transports.reads import ReadBucket
from weightcast.transports.recent import Recent

logger = logging.getLogger(__name__)

LANES = 3
"""Buckets: one is copied out of while others are on their way."""
FIRST_PAUSE_S, MAX_PAUSE_S = 2e-5, 1e-3
CLEAR_S = 60.0
"""How long a GPU may take to be done with what lay in the buckets' memory before."""


class Source(NamedTuple):
    """A trainer's storages as its agent has registered them."""

    agent: str
    extents: tuple[Extent, ...]
    device: torch.device


class Reader:
    """Reads of one pair, into buckets on one device. Not thread-safe."""

    def __init__(
        self, agent: Agent, source: Source, parts: Mapping[int, Sequence[ReadBucket]], device: torch.device
    ) -> None:
        self.device = device
        self.has_written = False
        """Whether the last ``run`` may have written anything into its memory."""
        self._agent, self._parts = agent, parts
        sizes = [bucket.nbytes for buckets in parts.values() for bucket in buckets]
        self._buffers = [
            torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(LANES, len(sizes)))
        ]
        if device.type == "cuda":
            # NIXL writes beside all streams; kernels queued before may still use this memory.
            wait_stream(device, Deadline(CLEAR_S), "the work on the buckets' memory")
        self._reads: dict[int, list[Read]] = {}
        self._lists: list[int] = []
        self._steps: Recent[list[Step]] = Recent(parts=max(1, len(parts)))
        self._registered = agent.register([Extent.of(b) for b in self._buffers], device) if self._buffers else None
        for part, buckets in parts.items():
            self._reads[part] = self._prepared(source, buckets)

    def compile(self, memory: Memory, check: Callable[[], None]) -> None:
        """Compile what copies out of the buckets into ``memory``."""
        for part in self._parts:
            self._steps_for(memory, part, check)

    def run(self, memory: Memory, part: int, deadline: Deadline, check: Callable[[], None]) -> None:
        """Read a part into ``memory``; ``check`` is called meanwhile and may raise."""
        self.has_written = False
        reads, lanes, started = self._reads[part], len(self._buffers), 0
        for number, step in enumerate(self._steps_for(memory, part, check)):
            while started < min(number + lanes, len(reads)):
                reads[started].start()
                started += 1
            self._wait(reads[number], deadline, check)
            self.has_written = True
            step(deadline)

    def read_once(self, deadline: Deadline, check: Callable[[], None]) -> None:
        """Read every bucket and copy nothing."""
        for reads in self._reads.values():
            for read in reads:
                read.start()
                self._wait(read, deadline, check)

    def close(self) -> bool:
        """Let go of everything; idempotent. False while a read may still write into a bucket: nothing is let go of then."""
        if not all(read.has_ended() for reads in self._reads.values() for read in reads):
            return False
        for reads in self._reads.values():
            while reads:
                reads.pop().release()
        while self._lists:
            self._agent.forget(self._lists.pop())
        if self._registered is not None:
            self._agent.deregister(self._registered)
            self._registered = None
        self._steps.clear()
        self._buffers = []
        return True

    def _prepared(self, source: Source, buckets: Sequence[ReadBucket]) -> list[Read]:
        """The reads of a part, one a bucket."""
        here, there, reads = [], [], []
        for number, bucket in enumerate(buckets):
            buffer = Extent.of(self._buffers[number % len(self._buffers)])
            for place in bucket.ranges:
                extent = source.extents[place.storage]
                here.append(Extent(buffer.address + place.place, place.nbytes, buffer.device))
                there.append(Extent(extent.address + place.start, place.nbytes, extent.device))
        if not buckets:
            return []
        local = self._agent.prepare(here, self.device)
        self._lists.append(local)
        remote = self._agent.prepare(there, source.device, source.agent)
        self._lists.append(remote)
        end = 0
        for bucket in buckets:
            reads.append(self._agent.read(local, remote, range(end, end + len(bucket.ranges))))
            end += len(bucket.ranges)
        return reads

    def _steps_for(self, memory: Memory, part: int, check: Callable[[], None]) -> list[Step]:
        return self._steps.get((memory.number, part), lambda: self._compiled(memory, part, check))

    def _compiled(self, memory: Memory, part: int, check: Callable[[], None]) -> list[Step]:
        buckets = self._parts[part]
        mover = mover_for(memory, [copy for bucket in buckets for copy in bucket.copies], check, is_source=False)
        steps = []
        for number, bucket in enumerate(buckets):
            step = mover.step(bucket.copies, Memory([self._buffers[number % len(self._buffers)]]), memory)
            steps.append(_first(mover.begin, step) if number == 0 else step)
        return steps

    @staticmethod
    def _wait(read: Read, deadline: Deadline, check: Callable[[], None]) -> None:
        pause_s = FIRST_PAUSE_S
        while not read.is_done():
            check()
            deadline.check("reading the trainer's memory")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


class Unfinished:
    """Readers of pairs that are closed, with their agents, until no read of theirs may write any more. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Agent, list[Reader]]] = []

    def close(self, agent: Agent, readers: list[Reader]) -> None:
        """Close a pair's readers, then its agent; those whose reads have not ended are kept and closed by a later call."""
        with self._lock:
            self._left.append((agent, readers))
        self.sweep()

    def sweep(self) -> None:
        """Close the pairs whose reads have ended meanwhile."""
        with self._lock:
            self._left = [(agent, readers) for agent, readers in self._left if not _closed(agent, readers)]
            if self._left:
                logger.info("%d pairs have reads in flight that the trainer has not answered", len(self._left))

    def __len__(self) -> int:
        with self._lock:
            return len(self._left)


def _closed(agent: Agent, readers: list[Reader]) -> bool:
    try:
        if not all(reader.close() for reader in readers):
            return False
    except WeightcastError as error:
        logger.warning("buckets stay registered with NIXL until their agent ends: %s", error)
    agent.close()
    return True


def _first(begin: Callable[[], None], step: Step) -> Step:
    def run(deadline: Deadline) -> None:
        begin()
        step(deadline)

    return run
