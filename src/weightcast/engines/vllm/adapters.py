"""Adapters of a vLLM worker: their versions, each of which is an adapter of vLLM's with a number of its own, and room for them.

Load-bearing: a version is registered in the call that makes it live, on the worker's thread, before anything else of that call. Where
there is no room for it, nothing was changed and every worker says so alike.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from weightcast.engines.vllm.lora import LoraManager
from weightcast.errors import MERGED_HINT, PlanMismatch, StateError, Unsupported
from weightcast.layout.memory import Memory
from weightcast.manifest.adapters import AdapterConfig, Factors
from weightcast.manifest.dtypes import dtype_of
from weightcast.manifest.names import shown
from weightcast.receiver.adapter_model import AdapterModel


@dataclass(eq=False, slots=True)
class VllmVersion:
    """One version of an adapter. vLLM computes with copies, so its memory may be written at any time."""

    memory: Memory
    adapter: Any
    label: str = ""
    """Name and version, such as ``policy@3-9f2c…``; empty until the version went live."""
    number: int = 0
    """The number that requests name it by; 0 until it is registered."""

    @property
    def in_use(self) -> bool:
        return False


class VllmAdapter(AdapterModel[VllmVersion]):
    """One adapter of a vLLM worker."""

    def __init__(self, name: str, adapters: VllmAdapters) -> None:
        super().__init__(name, adapters.manager.device, adapters.lock)
        self._adapters = adapters
        self.registered: list[VllmVersion] = []
        """What vLLM has, in the order in which the versions came."""

    def check(self, factors: Mapping[str, Factors]) -> None:
        self._adapters.check(self.name, factors)

    def check_room(self, num_wanted: int) -> None:
        """For a trainer that joins: what is live, and one version beside it."""
        self._adapters.check_room(self, num_wanted=2, named="")

    def make(
        self, memory: Memory, config: AdapterConfig, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> VllmVersion:
        return VllmVersion(memory, self._adapters.manager.build(config, matrices))

    @property
    def ids(self) -> dict[str, int]:
        """The numbers of the versions that a request may name, by label."""
        return {version.label: version.number for version in self.registered if version.label}

    def tidy(self, named: Collection[int]) -> None:
        """Forget the versions that nothing needs: neither the name, nor a way back, nor a request of those ``named``."""
        with self.lock:
            needed = {id(version) for version in (self.current, *self._made.values()) if version is not None}
            for version in [each for each in self.registered if id(each) not in needed and each.number not in named]:
                self._adapters.manager.remove(version.number)
                self.registered.remove(version)

    def prepare(self, key: str, named: Collection[int]) -> None:
        """Register the version that was made and is not registered yet. StateError where there is no room; nothing was registered then.

        ``key`` tells this update from all others, alike in all workers. ``named`` are the numbers that requests name.
        """
        with self.lock:
            made = [version for version in self._made.values() if version is not None and not version.number]
            if made:
                running = [version.label for version in self.registered if version.number in named]
                self._adapters.check_room(self, num_wanted=len(self.registered) + len(made), named=", ".join(running))
            for version in made:
                version.number = self._adapters.free_number(f"{self.name}\0{key}")
                self._adapters.manager.add(version.number, version.adapter)
                self.registered.append(version)


class VllmAdapters:
    """All adapters of one worker."""

    def __init__(self, worker: Any) -> None:
        self.manager = LoraManager(worker)
        self.lock = threading.RLock()
        self._by_name: dict[str, VllmAdapter] = {}

    def named(self, name: str) -> VllmAdapter:
        """The adapter of that name, made if there is none."""
        with self.lock:
            return self._by_name.setdefault(name, VllmAdapter(name, self))

    def tidy(self, named: Collection[int]) -> None:
        """Forget the versions that nothing needs, of all adapters."""
        for adapter in self._by_name.values():
            adapter.tidy(named)

    @property
    def numbers(self) -> list[int]:
        """The numbers of all versions that are registered."""
        return [version.number for adapter in self._by_name.values() for version in adapter.registered]

    def check(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Refuse by name what vLLM cannot compute with, or would copy into a layer of another shape."""
        shapes = self.manager.shapes()
        layers = {module: self.manager.layer_name(module) for module in factors}
        if strangers := [module for module, layer in layers.items() if layer not in shapes]:
            raise Unsupported(
                f"{shown(strangers)}: this vLLM has no linear layers of these names that the adapter {name!r} could change",
                hint=MERGED_HINT,
            )
        for module, each in factors.items():
            given = (each.a.shape[1], each.b.shape[0])
            if given != shapes[layers[module]]:
                raise PlanMismatch(
                    f"{module!r} has {shapes[layers[module]]} inputs and outputs, the adapter's matrices are {each.a.shape} and {each.b.shape}"
                )
            if not dtype_of(each.a.dtype).is_floating_point:
                raise Unsupported(f"the adapter of {module!r} is of type {each.a.dtype}", hint=MERGED_HINT)
        highest = max(each.rank for each in factors.values())
        if highest > self.manager.max_rank:
            raise Unsupported(
                f"the adapter {name!r} has rank {highest}, the engine takes {self.manager.max_rank}",
                hint=f"Start vLLM with --max-lora-rank {highest} or the next higher rank that vLLM takes",
            )

    def check_room(self, adapter: VllmAdapter, *, num_wanted: int, named: str) -> None:
        """StateError that names the setting to raise where there is no room for so many versions of an adapter beside all others."""
        others = [other for other in self._by_name.values() if other is not adapter]
        taken = self.manager.num_others + sum(max(each.num_slots, len(each.registered)) for each in others)
        capacity = self.manager.capacity
        if taken + num_wanted > capacity:
            still = f", since requests still run on {named}" if named else ""
            wait = ", or wait for these requests to end" if named else ""
            raise StateError(
                f"no slot is free for {adapter.name!r}: {num_wanted} versions are needed{still}, {taken} of {capacity} slots are taken by others",
                hint=f"Start vLLM with --max-loras {taken + num_wanted} or more (and --max-cpu-loras, where that is set){wait}",
            )

    def free_number(self, key: str) -> int:
        """A number for a version, the same in all workers, that is none of an adapter from elsewhere, which vLLM counts from 1."""
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") | 1 << 30
        number &= (1 << 31) - 1
        while self.manager.is_taken(number):
            number = number % ((1 << 31) - 1) + 1
        return number
