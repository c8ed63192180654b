"""A vLLM server's engine as weightcast's routes want it: a stock engine, and the updates of vLLM's own routes."""

from __future__ import annotations

from typing import Any

from weightcast.commit.worker_outcome import first_error
from weightcast.engines.stock.front import StockControl, StockFront
from weightcast.vllm_protocol.eras import ServedEngine, served_engine


class VllmFront(StockFront[ServedEngine]):
    """What the routes ask of the engine beside commits; ``client`` is vLLM's EngineClient. For one event loop."""

    def __init__(self, client: Any) -> None:
        super().__init__(served_engine(client))

    async def close_update(self, label: str | None) -> None:
        """End an update of vLLM's own routes: named ``label`` when every worker carried it out, else the first error is raised."""
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
        """Raise what the last call of vLLM's own routes came to, if any worker could not carry it out; what is then of no version is
        held. ``closes``: as for a call that raises in vLLM's worker, no update is open after that."""
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
