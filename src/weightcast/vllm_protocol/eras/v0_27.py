"""vLLM 0.27 to 0.31: outputs carry a version, which ``update_weight_version`` sets."""

from __future__ import annotations

from typing import Any

from weightcast.vllm_protocol.eras import v0_26


class Served(v0_26.Served):
    """AsyncLLM with a version label."""

    @staticmethod
    def fits(client: Any) -> bool:
        return v0_26.Served.fits(client) and hasattr(client, "update_weight_version")

    async def set_label(self, version: str) -> None:
        await self.client.update_weight_version(version)


class Offline(v0_26.Offline):
    """LLM with a version label; so are those of later versions."""

    @staticmethod
    def fits(llm: Any) -> bool:
        return v0_26.Offline.fits(llm) and hasattr(llm, "update_weight_version")

    def set_label(self, version: str) -> None:
        self.llm.update_weight_version(version)
