"""BareEngine: the part of an InferenceEngine that control routes use, over workers without a language model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tests.support.faults import Faults
from weightcast.content.layout_digest import digest_tensor
from weightcast.engines.base import EngineStatus
from weightcast.errors import StateError, WeightcastError
from weightcast.testing.local_engine import DictModel
from weightcast.weight_transfer.weightcast import WeightcastEngine

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What an engine is at one moment between two commits. ``holds``: whether every live byte is that of the version it says;
    None where it was not told what that is."""

    version: str
    dirty: bool
    paused: bool
    holds: bool | None = None
    checksums: Mapping[str, str] | None = None


class FaultyModel(DictModel):
    """Its loader reaches a point of injection after its first tensor."""

    def __init__(self, faults: Faults, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
        super().__init__(tensors, **options)
        self._faults = faults

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for i, item in enumerate(tensors):
                if i == 1:
                    self._faults.hit("loader")
                yield item

        super().load_weights(watched())


class BareEngine:
    """One thread stands for the model's: whatever touches live weights runs on it, and a commit of all workers is one call."""

    def __init__(self, workers: Sequence[WeightcastEngine], models: Sequence[DictModel], faults: Faults) -> None:
        self._workers, self._models, self._faults = list(workers), list(models), faults
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._thread.submit(int).result()  # it is there from the start, so that counting threads finds leaks only
        self._paused = False
        self.num_syncs = 0

    async def _run(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(command))

    def between_commits(self, command: Callable[[], T]) -> T:
        """What a command gives on the model's thread, where no commit is half-way; for other threads."""
        return self._thread.submit(command).result()

    @property
    def world_size(self) -> int:
        return len(self._workers)

    @property
    def dirty(self) -> bool:
        """Also when workers are clean and serve different things: a forward pass would use both."""
        served = {(worker.weight_version, worker.digest) for worker in self._workers}
        return any(worker.dirty for worker in self._workers) or len(served) > 1

    def snapshot(self, seen_as: Callable[[str], Mapping[str, torch.Tensor] | None], with_checksums: bool) -> Snapshot:
        """The engine as it is; ``seen_as`` gives the checkpoint of a version, where it is known. On the model's thread."""
        version = self._workers[0].weight_version
        expected = seen_as(version)
        return Snapshot(
            version=version,
            dirty=self.dirty,
            paused=self._paused,
            holds=None if expected is None else self.holds(expected),
            checksums=self.whole_checksums() if with_checksums else None,
        )

    def holds(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether every live byte of every worker is that of a checkpoint. On the model's thread."""
        return all(model.holds(tensors) for model in self._models)

    def whole_checksums(self) -> dict[str, str]:
        """Digest per live tensor, put together from the workers' rows. On the model's thread."""
        parts = [model.parameters() for model in self._models]
        cut = self._models[0].cut
        wholes = {name: torch.cat([p[name] for p in parts]) if name in cut else parts[0][name] for name in parts[0]}
        return {name: f"{digest_tensor(whole):016x}" for name, whole in wholes.items()}

    # -- what the control routes call

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        def join() -> None:
            self._faults.hit("join")
            for worker in self._workers:
                worker.init_transfer_engine(worker.parse_init_info(init_info))

        await self._run(join)

    async def start_weight_update(self) -> None:
        def start() -> None:
            for worker in self._workers:
                worker.start_weight_update()

        await self._run(start)

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        def update() -> None:
            self._faults.hit(f"{update_info['action']}:start")
            self._update(update_info)
            self._faults.hit(f"{update_info['action']}:end")

        await self._run(update)

    def _update(self, update_info: Mapping[str, Any]) -> None:
        """Every worker is asked, whatever the others say; the round is closed for all when one of them refuses."""
        errors: list[WeightcastError] = []
        for worker in self._workers:
            try:
                worker.update_weights(worker.parse_update_info(update_info))
            except WeightcastError as error:
                errors.append(error)
        if errors:
            for worker in self._workers:
                with suppress(StateError):  # closed by its own error
                    worker.finish_weight_update()
            raise errors[0]

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        def finish() -> None:
            for worker in self._workers:
                worker.finish_weight_update(weight_version)
            self.num_syncs += 1

        await self._run(finish)

    async def shutdown_weight_transfer_engine(self) -> None:
        def leave() -> None:
            for worker in self._workers:
                worker.shutdown()

        await self._run(leave)

    async def pause_generation(self, mode: str = "abort", clear_cache: bool = True) -> None:
        self._paused = True

    async def resume_generation(self) -> None:
        self._paused = False

    async def is_paused(self) -> bool:
        return self._paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return True

    async def get_weight_version(self) -> str:
        return self._workers[0].weight_version

    async def checksums(self) -> dict[str, str]:
        return await self._run(self._workers[0].checksums)

    async def status(self) -> EngineStatus:
        first, dirty = self._workers[0], self.dirty
        return EngineStatus(
            model="tensors", weight_version=first.weight_version, digest=first.digest or None, ready=not dirty,
            reason="dirty" if dirty else "", dirty=dirty, paused=self._paused, num_running=0, num_waiting=0,
            num_kv_tokens=0, kv_capacity_tokens=0, num_generated_tokens=0, num_preemptions=0, num_syncs=self.num_syncs,
            world_size=len(self._workers), backend="weightcast",
        )  # fmt: skip
