"""The port of one adapter of a stock engine. A commit registers a version in all workers, and then points the adapter's name at it.

Load-bearing: the name moves only when every worker has the version. Until then, and after a way back, it stands for what all of them
serve, so nothing pauses, however many workers there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightcast.commit.adapters import AsyncUnpaused
from weightcast.commit.order import RoundOrder, Serving
from weightcast.commit.stock import StockEngine, StockPort
from weightcast.commit.updates import update_info
from weightcast.commit.worker_outcome import WorkerOutcome, common_version
from weightcast.deadline import Deadline
from weightcast.manifest.adapters import version_label


class StockAdapterPort(AsyncUnpaused):
    """The steps of an adapter's commit (see commit.machine) over a StockEngine's calls. For the engine's event loop."""

    def __init__(self, engine: StockEngine, name: str) -> None:
        self._engine, self._port, self._name = engine, StockPort(engine), name

    async def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine that can sleep has no adapters."""
        return ""

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        """Older versions are refused first: the workers forget those that no request names when they hear of the update."""
        self._engine.retire(self._name, None)
        return Serving.of(await self.ask("update", update_info(order, deadline)))

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return await self.apply(order.way_back(), deadline)

    async def name(self, version: str, deadline: Deadline) -> None:
        self._engine.point(self._name, *standing_for(self._name, await self.ask("status")))

    async def serving(self, deadline: Deadline) -> Serving:
        return Serving.of(await self.ask("status"))

    async def hold(self, reason: str, deadline: Deadline) -> None:
        """The name stands for nothing; versions that are there can be named, and the model and other adapters go on."""
        self._engine.point(self._name, "", ids_of(await self.ask("status")))

    async def ask(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        """A call about the adapter in all workers of all replicas. Unsupported unless every worker answers."""
        self._engine.require_backend()
        self._engine.require_adapters()
        call = self._engine.call_about_adapter(action, {**(payload or {}), "adapter": self._name})
        outcomes = await self._port.outcomes(call)
        self._engine.retire(self._name, ids_of(outcomes))
        return outcomes


def standing_for(name: str, outcomes: Sequence[WorkerOutcome]) -> tuple[str, dict[str, int]]:
    """The label that an adapter's name stands for by its workers' outcomes, empty for none, and the versions that all of them have."""
    ids, label = ids_of(outcomes), version_label(name, common_version(outcomes))
    return (label if label in ids else ""), ids


def ids_of(outcomes: Sequence[WorkerOutcome]) -> dict[str, int]:
    """The versions of an adapter that all workers have, with the engine's own numbers of them."""
    found = dict(outcomes[0].ids)
    for outcome in outcomes[1:]:
        found = {label: number for label, number in found.items() if outcome.ids.get(label) == number}
    return found
