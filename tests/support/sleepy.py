"""Engines that sleep as vLLM's do, without a GPU: memory that is not mapped must not be touched, and of level 2 it comes back as anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from weightcast.deadline import Deadline
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.testing.local_engine import DictModel, LocalEngine


class SleepingModel(DictModel):
    """Its memory must not be touched while it is unmapped: that would end a process with a GPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
        self.unmapped = False
        self.asleep: set[str] = set()
        """Tags of what sleeps, where the engine keeps account of that."""
        super().__init__(tensors, **options)

    def why_asleep(self) -> str:
        return "its weights are not mapped" if self.unmapped else ""

    @property
    def asleep_nbytes(self) -> int:
        return 1 << 20 if self.asleep else 0

    def _touch(self) -> None:
        assert not self.unmapped, "unmapped memory was touched"

    def layout(self, manifest: Manifest) -> Layout:
        self._touch()
        return super().layout(manifest)

    def memory(self) -> Memory:
        self._touch()
        return super().memory()

    def rebind(self, memory: Memory) -> None:
        self._touch()
        super().rebind(memory)

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._touch()
        super().load_weights(tensors)


class SleepyEngine(LocalEngine):
    """An engine of so many workers. ``said`` is what was asked of it, in order; ``computes`` whether its scheduler goes on."""

    kind = "sleepy"

    def __init__(
        self, name: str, weights: Mapping[str, torch.Tensor], *, mode: str = "auto", num_workers: int = 1
    ) -> None:
        models = [SleepingModel(weights, rows=(rank, num_workers), relocatable=False) for rank in range(num_workers)]
        super().__init__(name, models, mode=mode)
        self.sleepy = models
        self.asleep: set[str] = set()
        self.computes = True
        self.said: list[str] = []

    def fall_asleep(self, level: int) -> None:
        """As vLLM: the scheduler stands still first, then every worker hears of it, then the memory is gone."""
        self.computes = False
        self.asleep = {"weights", "kv_cache"}
        for worker, model in zip(self.workers, self.sleepy, strict=True):
            worker.sleep(loses=level >= 2)
            if level >= 2:
                for tensor in model.parameters().values():
                    tensor.copy_(torch.randn(tensor.shape))
            model.unmapped, model.asleep = True, self.asleep

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        """As vLLM: the scheduler goes on when nothing sleeps any more, whatever the weights are."""
        self.said.append(f"wake {' '.join(tags) or 'all'}")
        self.before(f"wake {' '.join(tags) or 'all'}")
        self.asleep -= set(tags) if tags else set(self.asleep)
        for model in self.sleepy:
            model.unmapped = "weights" in self.asleep
        if not self.asleep:
            assert not any(worker.dirty for worker in self.workers), "vLLM would compute with weights of no version"
            self.computes = True
        return tuple(sorted(self.asleep))

    def commit(self, order: Any, deadline: Deadline) -> Any:
        self.said.append("commit")
        return super().commit(order, deadline)

    def shutdown(self, deadline: Deadline) -> None:
        self.said.append("leave")
        self.before("leave")
        self.stop()
