"""A trainer's memory as workers reach it through NIXL: registered with an agent of its own, once for all workers."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from weightcast.errors import InvalidInput, ProtocolError
from weightcast.layout.memory import Memory
from weightcast.transports.nixl_agent import RECEIPT, Agent, Extent


class Exposed:
    """One memory that agents with the metadata can reach. It keeps the memory's storages alive."""

    def __init__(self, memory: Memory) -> None:
        storages = [storage for storage in memory.storages if storage.numel()]
        kinds = {storage.device.type for storage in storages} or {"cpu"}
        if len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
            raise InvalidInput(f"nixl moves memory of CPUs or of CUDA GPUs, not {sorted(kinds)}", field="device")
        self.device = torch.device(kinds.pop())
        self._memory = memory
        self._lock = threading.Lock()
        self._receipts: dict[bytes, int] = {}
        self.agent = Agent()
        extents = _merged([Extent.of(storage) for storage in storages], touching=self.device.type == "cpu")
        self._registered = self.agent.register(extents, self.device) if extents else None
        self.metadata = self.agent.metadata()

    def expect(self, pair: bytes) -> None:
        """Count the receipts of this pair's worker from now on."""
        with self._lock:
            self._receipts[pair] = 0

    def receipts(self, pair: bytes) -> int:
        """Return how often the pair's worker says it has read a part. What strangers say is dropped."""
        with self._lock:
            for message in self.agent.told():
                if len(message) != RECEIPT.size:
                    raise ProtocolError(f"a receipt of {len(message)} bytes")
                teller, count = RECEIPT.unpack(message)
                if teller in self._receipts:
                    self._receipts[teller] = max(self._receipts[teller], count)
            return self._receipts[pair]

    def forget(self, pair: bytes) -> None:
        with self._lock:
            self._receipts.pop(pair, None)

    def close(self) -> None:
        """Nobody reaches the memory any more; idempotent."""
        if self._registered is not None:
            self.agent.deregister(self._registered)
            self._registered = None
        self.agent.close()
        self._memory = Memory([])


class Exposures:
    """What a process exposes, by memory: for as long as a pair uses the memory, and between pairs until it is released. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exposed: dict[int, Exposed] = {}
        self._num_lent: dict[int, int] = {}
        self._kept: set[int] = set()

    def keep(self, memory: Memory) -> None:
        """Keep the memory exposed, once a pair used it, until ``release``."""
        with self._lock:
            self._kept.add(memory.number)

    def lend(self, memory: Memory) -> Exposed:
        """Return the memory's exposure, for one pair."""
        number = memory.number
        with self._lock:
            if number not in self._exposed:
                self._exposed[number], self._num_lent[number] = Exposed(memory), 0
            self._num_lent[number] += 1
            return self._exposed[number]

    def give_back(self, memory: Memory) -> None:
        """A pair that had the exposure is closed."""
        with self._lock:
            self._num_lent[memory.number] -= 1
            self._close_unused(memory.number)

    def release(self, memory: Memory) -> None:
        """Nobody makes pairs of this memory any more."""
        with self._lock:
            self._kept.discard(memory.number)
            self._close_unused(memory.number)

    def _close_unused(self, number: int) -> None:
        if number in self._exposed and not self._num_lent[number] and number not in self._kept:
            del self._num_lent[number]
            self._exposed.pop(number).close()


def _merged(extents: Sequence[Extent], *, touching: bool) -> list[Extent]:
    """The same bytes without overlaps, and, where that is wanted, in as few pieces as possible."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.device, extent.address)):
        last = merged[-1] if merged else None
        end = -1 if last is None or last.device != extent.device else last.address + last.nbytes
        if last is not None and (extent.address < end or (touching and extent.address == end)):
            nbytes = max(end, extent.address + extent.nbytes) - last.address
            merged[-1] = last._replace(nbytes=nbytes)
        else:
            merged.append(extent)
    return merged
