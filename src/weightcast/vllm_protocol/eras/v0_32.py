"""vLLM 0.32 and later: the core's client has a call that brings every replica's answer."""

from __future__ import annotations

from typing import Any

from weightcast.vllm_protocol.eras import base


class Served(base.ServedEngine):
    """AsyncLLM whose core answers for all replicas."""

    @staticmethod
    def fits(client: Any) -> bool:
        return hasattr(getattr(client, "engine_core", None), "call_utility_all_async")

    async def in_each_replica(self, method: str, *arguments: Any) -> list[Any]:
        return list(await self.client.engine_core.call_utility_all_async(method, *arguments))

    def require_adapters(self) -> None:
        base.require_lora(self.config)
        self.adapter_names()  # from now on requests by name are told from those for files

    async def set_label(self, version: str) -> None:
        await self.client.update_weight_version(version)
