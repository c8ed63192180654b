"""A vLLM server's engine as weightcast's routes want it: a stock engine, and the updates of vLLM's own routes."""

from __future__ import annotations

from typing import Any

from weightcast.commit.stock import StockPort
from weightcast.commit.stock_adapters import StockAdapterPort
from weightcast.commit.worker_outcome import first_error
from weightcast.engines.stock.front import StockControl, StockFront
from weightcast.vllm_protocol.eras import ServedEngine, served_engine


class VllmFront(StockFront[ServedEngine]):
    """What the routes ask of the engine beside commits; ``client`` is vLLM's EngineClient. For one event loop."""

    def __init__(self, client: Any) -> None:
        super().__init__(served_engine(client))

    def port_of(self, adapter: str) -> StockPort | StockAdapterPort:
        port = super().port_of(adapter)
        if adapter:
            self.engine.adapter_names().check(adapter)
        return port

    async def close_update(self, label: str | None) -> None:
        """End an update of vLLM's own routes. When every worker carried the update out, the version is named ``label``; otherwise the
        first error is raised."""
        self.engine.require_backend()
        await self.raise_outcome(closes=False)
        await self.engine.close_update()
        outcomes = await self.port.ask("status")
        error = first_error(outcomes)
        await self.name_or_hold(outcomes)
        if error is not None:
            raise error
        if label is not None:
            await self.engine.set_label(label)

    async def raise_outcome(self, *, closes: bool) -> None:
        """Raise the error of the last call of vLLM's own routes if a worker could not carry that call out. An engine whose weights are
        then of no version is held. With ``closes`` no update is open afterwards, as after a call that raises in vLLM's worker."""
        outcomes = await self.port.ask("status")
        error = first_error(outcomes)
        if error is None:
            return
        if closes:
            await self.engine.close_update()
        await self.name_or_hold(outcomes)
        raise error


class VllmControl(StockControl[VllmFront]):
    """EngineControl over a vLLM engine."""

    def __init__(self) -> None:
        super().__init__(VllmFront)
