"""verl's side of a sync, as small as it gets: its own manager, worker groups and rollout workers around a trainer of two ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from verl.checkpoint_engine.base import CheckpointEngineRegistry
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.import_utils import import_external_libs
from verl.workers.config import CheckpointEngineConfig

TOKENS = list(range(20, 44))


class Trainer(Worker):
    """What verl's actor worker does with a checkpoint engine, around a model that learns on two ranks."""

    def __init__(self, folder: str, config: CheckpointEngineConfig) -> None:
        super().__init__()
        initialize_global_process_group_ray(backend="cpu:gloo")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        import_external_libs(config.custom_backend_module or None)
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            config.backend, is_master=self.rank == 0, bucket_size=2**20, **config.engine_kwargs.get(config.backend, {})
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def learn(self) -> float:
        tokens = torch.tensor([TOKENS[self.rank :]])
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self._optimizer.zero_grad()
        loss.backward()
        for value in self.model.parameters():
            dist.all_reduce(value.grad)
        self._optimizer.step()
        return float(loss)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save(self, folder: str) -> None:
        if self.rank == 0:
            self.model.save_pretrained(folder)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> dict[str, Any]:
        weights = self._gathered() if (global_steps or 0) % 2 else _asynchronous(self._gathered())
        with torch.no_grad():
            return await self.checkpoint_engine.send_weights(weights, global_steps=global_steps) or {}

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.checkpoint_engine, method)(*args, **kwargs)

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor from one rank to the other, in one buffer that is used again."""
        buffer = torch.empty(max(value.numel() for value in self.model.parameters()))
        for number, (name, value) in enumerate(self.model.named_parameters()):
            whole = buffer[: value.numel()].view(value.shape)
            owner = number % dist.get_world_size()
            if owner == self.rank:
                whole.copy_(value.detach())
            dist.broadcast(whole, owner)
            yield name, whole
            buffer.fill_(torch.nan)


async def _asynchronous(weights: Iterator[Any]) -> AsyncIterator[Any]:
    for pair in weights:
        yield pair


class ServerAdapter:
    """Stands for verl's adapter of vLLM, which needs vLLM: it does nothing where a delta has nothing in it."""

    replica_rank, is_leader_rank = 0, True

    async def update_weights(self, weights: Any, global_steps: int | None = None, wire_format: str = "") -> None:
        assert wire_format == "delta_flush"
        async for _ in weights:
            raise AssertionError("the rollout worker was handed weights")


class Replica:
    """A replica's workers, and what verl asks of it around a sync."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers, self.asked = workers, []

    def __getattr__(self, name: str) -> Any:
        async def ask(**_: Any) -> None:
            self.asked.append(name)

        return ask


def rollout_config(config: CheckpointEngineConfig) -> Any:
    """As much of verl's rollout config as its worker reads."""
    return SimpleNamespace(checkpoint_engine=config, name="vllm", mode="async")
