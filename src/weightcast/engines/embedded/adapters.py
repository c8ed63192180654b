"""Adapters of the embedded engine: LoRA versions side by side, and what each of them adds to the linear layers of a packed step.

A version's matrices are views of the memory in which a round left them. A step computes each version's part for the rows of its own
requests and for no others, so values of one version, NaN included, never reach requests of another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from weightcast.engines.embedded.linears import Linears, shape_of
from weightcast.errors import MERGED_HINT, PlanMismatch, StateError, UnknownModel, Unsupported
from weightcast.layout.memory import Memory
from weightcast.manifest.adapters import AdapterConfig, Factors
from weightcast.manifest.dtypes import dtype_of
from weightcast.manifest.names import shown
from weightcast.receiver.adapter_model import AdapterModel

Matrices = tuple[torch.Tensor, torch.Tensor, float]
"""A, B and the scaling of one module."""


@dataclass(eq=False, slots=True)
class AdapterVersion:
    """One version of an adapter, which stays until no request runs on it."""

    name: str
    memory: Memory
    modules: Mapping[str, Matrices]
    label: str = ""
    """Name and version, such as ``policy@3-9f2c…``; empty until the version went live."""
    num_requests: int = 0

    @property
    def in_use(self) -> bool:
        return self.num_requests > 0


@dataclass(slots=True, kw_only=True)
class StepPart:
    """The rows of a step that one version computes: of all tokens, and of those whose logits are wanted. None: all rows."""

    version: AdapterVersion
    rows: torch.Tensor | None
    kept: torch.Tensor | None


class EmbeddedAdapter(AdapterModel[AdapterVersion]):
    """One adapter of the embedded engine."""

    def __init__(self, name: str, adapters: Adapters) -> None:
        super().__init__(name, adapters.device, adapters.lock)
        self._adapters = adapters

    def check(self, factors: Mapping[str, Factors]) -> None:
        self._adapters.check(self.name, factors)

    def check_room(self, num_wanted: int) -> None:
        self._adapters.check_room(self.name, num_wanted)

    def make(
        self, memory: Memory, config: AdapterConfig, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> AdapterVersion:
        modules = {module: (a, b, config.scaling_of(module)) for module, (a, b) in matrices.items()}
        return AdapterVersion(self.name, memory, modules)


@dataclass(eq=False)
class Adapters:
    """All adapters of an engine: their slots, who runs on them, and their part of a step."""

    model: Any
    linears: Linears
    max_adapters: int
    max_rank: int
    by_name: dict[str, EmbeddedAdapter] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _hooked: set[str] = field(default_factory=set)
    _parts: list[StepPart] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def named(self, name: str) -> EmbeddedAdapter:
        """The adapter of that name, made if there is none."""
        with self.lock:
            return self.by_name.setdefault(name, EmbeddedAdapter(name, self))

    # -- what can be held

    def check(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Refuse by name what cannot be computed here, and have the others' layers ask for their part of a step."""
        able = self.linears.able
        strangers = [module for module in factors if module not in able]
        if others := [module for module in strangers if module in self.linears.others]:
            raise Unsupported(
                f"{shown(others)}: this engine computes adapters for layers that see every token, not for parts of experts",
                hint=MERGED_HINT,
            )
        if strangers:
            raise PlanMismatch(
                f"the model has no linear layers {shown(strangers)}, which the adapter {name!r} is for",
                hint=MERGED_HINT,
            )
        for module, each in factors.items():
            if (each.a.shape[1], each.b.shape[0]) != shape_of(able[module]):
                raise PlanMismatch(
                    f"{module!r} is {shape_of(able[module])}, the adapter's matrices are {each.a.shape} and {each.b.shape}"
                )
            if not dtype_of(each.a.dtype).is_floating_point:
                raise Unsupported(f"the adapter of {module!r} is of type {each.a.dtype}", hint=MERGED_HINT)
        highest = max(each.rank for each in factors.values())
        if highest > self.max_rank:
            raise Unsupported(
                f"the adapter {name!r} has rank {highest}, the engine takes {self.max_rank}",
                hint=f"Start the engine with max_lora_rank={highest}",
            )
        self._hook(factors)

    def check_room(self, name: str, num_wanted: int) -> None:
        """StateError when there are no slots for so many more versions."""
        taken = sum(adapter.num_slots for adapter in self.by_name.values())
        if taken + num_wanted > self.max_adapters:
            raise StateError(
                f"no slot is free for {name!r}: {taken} of {self.max_adapters} are taken, {num_wanted} more are needed",
                hint=f"Start the engine with max_adapters={taken + num_wanted} or more, or wait for requests of older versions to end",
            )

    # -- requests

    def find(self, name: str) -> AdapterVersion:
        """The version that a request for ``name``, or for ``name@version``, runs on from now on. UnknownModel where there is none."""
        with self.lock:
            adapter = self.by_name.get(name.partition("@")[0])
            if adapter is not None and adapter.name == name and adapter.current is not None:
                return adapter.current
            for version in adapter.versions() if adapter is not None else ():
                if version.label == name:
                    return version
            known = sorted(each.name for each in self.by_name.values() if each.current is not None)
        raise UnknownModel(
            f"no adapter {name!r} is served: it was never published here, or that version is retired",
            field="model",
            hint=f"Served adapters: {', '.join(known) or 'none'}",
        )

    def take(self, name: str) -> AdapterVersion:
        """``find`` a version for a request, which keeps it until ``release``."""
        with self.lock:
            version = self.find(name)
            version.num_requests += 1
            return version

    def release(self, version: AdapterVersion) -> None:
        """A request has ended; a version that nobody needs any more is gone with that."""
        with self.lock:
            version.num_requests -= 1
            self.by_name[version.name].released()

    # -- a step

    @contextmanager
    def computing(self, parts: list[StepPart]) -> Iterator[None]:
        """While inside, linear layers add these versions' parts to the rows of a step."""
        self._parts = parts
        try:
            yield
        finally:
            self._parts = []

    def _hook(self, modules: Mapping[str, object]) -> None:
        head = self.model.get_output_embeddings()
        for name in modules:
            if name not in self._hooked:
                self._hooked.add(name)
                layer = self.linears.able[name]
                layer.register_forward_hook(self._adding(name, is_head=layer is head))

    def _adding(self, name: str, *, is_head: bool) -> Callable[..., torch.Tensor | None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._parts:
                return None
            rows = args[0].reshape(-1, args[0].shape[-1])
            sums = output.reshape(-1, output.shape[-1])
            for part in self._parts:
                matrices = part.version.modules.get(name)
                if matrices is not None:
                    sums = _added(sums, rows, part.kept if is_head else part.rows, matrices)
            return sums.reshape(output.shape)

        return add


def _added(sums: torch.Tensor, rows: torch.Tensor, at: torch.Tensor | None, matrices: Matrices) -> torch.Tensor:
    """Add B A x to the rows ``at``, in the adapter's own type as PEFT does, and in the layer's type in the end."""
    a, b, scaling = matrices
    mine = rows if at is None else rows[at]
    delta = linear(linear(mine.to(a.dtype), a), b) * scaling
    if at is None:
        return (sums + delta).to(sums.dtype)
    own = sums[at]
    return sums.index_copy(0, at, (own + delta).to(sums.dtype))
