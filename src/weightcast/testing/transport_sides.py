"""The two sides of a pair as objects that can live in this process or in a Peer: bytes in, bytes out."""

from __future__ import annotations

import gc
import importlib
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Copy
from weightcast.transports import TrainerEnd, Transport, WorkerEnd
from weightcast.transports.registry import registry


def load_transport(spec: str) -> Transport:
    """Return a transport by its registered name, or by "module:Class" for a transport that is not installed."""
    if ":" not in spec:
        return registry().get(spec)
    module, _, name = spec.partition(":")
    transport: Transport = getattr(importlib.import_module(module), name)()
    return transport


def census() -> dict[str, object]:
    """Count what a process could leak: threads, descriptors by kind, shared segments, mapped arenas."""
    gc.collect()
    kinds: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        kinds[target.partition(":")[0]] += 1
    maps = Path("/proc/self/maps").read_text()
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": dict(kinds),
        # Those that it maps: the folder also has what processes beside it made.
        "segments": maps.count("/dev/shm/"),
        "arenas": maps.count("memfd:weightcast"),
    }


class _Side:
    def __init__(self) -> None:
        self._timers: list[threading.Timer] = []

    def census(self) -> dict[str, object]:
        for timer in self._timers:
            timer.join()
        self._timers = []
        return census()

    def _later(self, delay_s: float, end: TrainerEnd | WorkerEnd) -> None:
        timer = threading.Timer(delay_s, end.abort)
        self._timers.append(timer)
        timer.start()


class TrainerSide(_Side):
    """A trainer with one pair."""

    transport: Transport
    memory: Memory
    end: TrainerEnd

    def open(self, spec: str, device: str, copies: Sequence[Copy], nbytes: Sequence[int], bucket_nbytes: int) -> bytes:
        """Make memory of the given storages, adopt the memory and make the end. Returns the offer."""
        self.transport = load_transport(spec)
        storages = [torch.zeros(size, dtype=torch.uint8, device=device) for size in nbytes]
        self.memory = self.transport.adopt(Memory(storages))
        self.end = self.transport.trainer_end(copies, self.memory, bucket_nbytes=bucket_nbytes)
        return self.end.offer()

    def connect(self, timeout_s: float = 20.0) -> None:
        self.end.connect(Deadline(timeout_s))

    def write(self, values: Sequence[bytes]) -> None:
        """Give all storages new values, as an optimizer step would."""
        _write(self.memory, values)

    def send(self, timeout_s: float = 20.0) -> int:
        return self.end.send(Deadline(timeout_s))

    def abort(self) -> None:
        self.end.abort()

    def abort_after(self, delay_s: float) -> None:
        self._later(delay_s, self.end)

    def close(self) -> None:
        """Close the end, give the memory up and forget it."""
        self.end.close()
        self.transport.release(self.memory)
        self.memory = Memory([])


class WorkerSide(_Side):
    """A worker with one pair and several memories to receive into."""

    end: WorkerEnd

    def open(self, spec: str, device: str, offer: bytes, copies: Sequence[Copy]) -> None:
        self._device = device
        self._memories: dict[int, Memory] = {}
        self.end = load_transport(spec).worker_end(offer, copies)

    def connect(self, timeout_s: float = 20.0) -> None:
        self.end.connect(Deadline(timeout_s))

    def fill(self, number: int, contents: Sequence[bytes], is_arena: bool = False) -> None:
        """Set the bytes of memory ``number``. The first call makes the memory."""
        if number not in self._memories:
            storages = [torch.empty(len(data), dtype=torch.uint8, device=self._device) for data in contents]
            self._memories[number] = Memory(storages, is_arena=is_arena)
        _write(self._memories[number], contents)

    def make(self, number: int, nbytes: Sequence[int]) -> None:
        """Make memory ``number``, filled with zeros."""
        self._memories[number] = Memory([torch.zeros(n, dtype=torch.uint8, device=self._device) for n in nbytes])

    def receive(self, number: int = 0, timeout_s: float = 20.0) -> int:
        return self.end.receive(self._memories[number], Deadline(timeout_s))

    def read(self, number: int = 0) -> list[bytes]:
        """Return the bytes of memory ``number``."""
        return [storage.cpu().numpy().tobytes() for storage in self._memories[number].storages]

    def abort(self) -> None:
        self.end.abort()

    def abort_after(self, delay_s: float) -> None:
        self._later(delay_s, self.end)

    def close(self) -> None:
        """Close the end and forget the memories."""
        self.end.close()
        self._memories.clear()


def _write(memory: Memory, contents: Sequence[bytes]) -> None:
    for storage, data in zip(memory.storages, contents, strict=True):
        if data:
            storage.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
