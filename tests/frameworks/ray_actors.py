"""Actors with engines, whose classes know nothing of weightcast: one that waits, and one on an event loop, as OpenRLHF's are."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from weightcast.engines.embedded import LLM, AsyncLLM


class Engine:
    """An actor that generates and waits."""

    def __init__(self, folder: str) -> None:
        self.llm = LLM(folder)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.llm.engine.model.named_parameters()}

    def version(self) -> str:
        return self.llm.get_weight_version()


class AsyncEngine:
    """An actor whose methods are coroutines. Its engine lies deeper."""

    def __init__(self, folder: str) -> None:
        self.worker = SimpleNamespace(engine=AsyncLLM(folder))

    async def weights(self) -> dict[str, torch.Tensor]:
        model = self.worker.engine.engine.model
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    async def version(self) -> str:
        return await self.worker.engine.get_weight_version()
