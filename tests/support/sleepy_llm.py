"""A stand-in for vLLM's ``LLM`` that sleeps, with one worker in this process: its weights are real and are published to, its answers tell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.sleepy import SleepingModel
from weightcast.content.live_tensors import LiveTensor
from weightcast.engines.stock.worker import StockModel, StockWorker
from weightcast.manifest import Manifest
from weightcast.weight_transfer.base import WorkerRank


class SleepyStockModel(SleepingModel, StockModel):
    """A model that a stock engine's worker serves."""

    def live_tensors(self, manifest: Manifest) -> dict[str, LiveTensor]:
        raise NotImplementedError("nobody asks")


class SleepyLLM:
    """As vLLM 0.26: memory that is awake must not be woken up, and nothing is generated while anything sleeps.

    ``said`` is what was asked of the engine, in order.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
        self.options, self.said = options, list[str]()
        self.model = SleepyStockModel(tensors, relocatable=False)
        self.worker = StockWorker(WorkerRank(rank=0, world_size=1), lambda: self.model, lambda: tuple(self.asleep))
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                parallel_config=SimpleNamespace(world_size=1, data_parallel_size=1),
                weight_transfer_config=SimpleNamespace(**options["weight_transfer_config"]),
                model_config=SimpleNamespace(enable_sleep_mode=options["enable_sleep_mode"]),
            ),
            model_executor=SimpleNamespace(driver_worker=None),
        )
        self.add_request = lambda prompt: None

    @property
    def asleep(self) -> set[str]:
        return self.model.asleep

    def sleep(self, level: int) -> None:
        self.said.append(f"sleep {level}")
        self.worker.before_sleep(loses=level >= 2)
        if level >= 2:
            for tensor in self.model.parameters().values():
                tensor.copy_(torch.randn(tensor.shape))
        self.model.asleep, self.model.unmapped = {"weights", "kv_cache"}, True

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        wanted = set(tags or self.asleep)
        self.said.append(f"wake {' '.join(sorted(wanted))}")
        assert wanted <= self.asleep, "vLLM 0.26 would map memory a second time"
        self.model.asleep = self.asleep - wanted
        self.model.unmapped = "weights" in self.asleep

    def generate(self, prompts: Sequence[Any], **_: Any) -> list[Any]:
        """One answer for each prompt, whose only token is the sum of all bits of all weights."""
        assert not self.asleep, "keys and values are not mapped"
        for prompt in prompts:
            getattr(self.llm_engine, "add_request", self.add_request)(prompt)
        self.said.append("generate")
        token = told_by(self.model.parameters())
        logprobs = [{token: SimpleNamespace(rank=1, logprob=0.0)}]
        output = SimpleNamespace(token_ids=[token], logprobs=logprobs)
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[output]) for p in prompts]

    def get_world_size(self) -> int:
        return 1

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        if args[1].get("action") == "commit":
            self.said.append("commit")
        return [self.worker.call(*args)]

    def reset_prefix_cache(self) -> bool:
        return True


def told_by(tensors: Mapping[str, torch.Tensor]) -> int:
    """A number that is another one for other weights."""
    return sum(int(tensor.detach().contiguous().view(torch.int32).to(torch.int64).sum()) for tensor in tensors.values())
