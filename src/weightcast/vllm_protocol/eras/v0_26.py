"""vLLM 0.26: outputs carry no version, and a utility call answers for the first replica only."""

from __future__ import annotations

import asyncio
from typing import Any

from weightcast.vllm_protocol.eras import base


class Served(base.ServedEngine):
    """AsyncLLM without a version label."""

    @staticmethod
    def fits(client: Any) -> bool:
        core = getattr(client, "engine_core", None)
        return hasattr(core, "_call_utility_async") and hasattr(core, "core_engines")

    async def in_each_replica(self, method: str, *arguments: Any) -> list[Any]:
        core = self.client.engine_core
        calls = [core._call_utility_async(method, *arguments, engine=engine) for engine in core.core_engines]
        return list(await asyncio.gather(*calls))

    async def set_label(self, version: str) -> None:
        return


class Offline(base.OfflineEngine):
    """LLM without a version label."""

    @staticmethod
    def fits(llm: Any) -> bool:
        return hasattr(llm, "collective_rpc") and hasattr(llm, "llm_engine")

    def set_label(self, version: str) -> None:
        return
