"""Ports of one adapter of an engine object. Its commit points a name at another version: nothing pauses, and no cache is forgotten.

Orders for adapters ask for no pause (see RoundOrder), and whether the engine computes or is held is the model's affair alone.
"""

from __future__ import annotations

from typing import Any

from weightcast.commit.order import RoundOrder, Serving, Standing
from weightcast.commit.updates import named, update_info
from weightcast.deadline import Deadline
from weightcast.errors import EngineError


class AsyncUnpaused:
    """The steps of an asynchronous port that are nothing where a commit points a name at another version."""

    async def standing(self, deadline: Deadline) -> Standing:
        """Whether the engine computes or is held is the model's affair alone."""
        return Standing(paused=False)

    async def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        """Nothing pauses."""

    async def forget(self, deadline: Deadline) -> None:
        """Keys and values are those of the versions that requests run on."""

    async def resume(self, was_held: bool, deadline: Deadline) -> None:
        """Nothing was paused."""


class Unpaused:
    """The steps of a synchronous port that are nothing where a commit points a name at another version."""

    def standing(self, deadline: Deadline) -> Standing:
        """Whether the engine computes or is held is the model's affair alone."""
        return Standing(paused=False)

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        """Nothing pauses."""

    def forget(self, deadline: Deadline) -> None:
        """Keys and values are those of the versions that requests run on."""

    def resume(self, was_held: bool, deadline: Deadline) -> None:
        """Nothing was paused."""


class AsyncAdapterPort(AsyncUnpaused):
    """An adapter of an asynchronous engine that has ``update_adapter`` and tells of adapters in its status, such as ``AsyncLLM``."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine, self._name = engine, name

    async def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine of this kind does not sleep."""
        return ""

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        error = None
        try:
            await self._engine.update_adapter(self._name, update_info(order, deadline))
        except Exception as failure:  # noqa: BLE001 - told with what is served now
            error = named(failure)
        return serving_of(await self._engine.status(), self._name, error)

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return await self.apply(order.way_back(), deadline)

    async def name(self, version: str, deadline: Deadline) -> None:
        """Nothing: the update named it."""

    async def serving(self, deadline: Deadline) -> Serving:
        return serving_of(await self._engine.status(), self._name, None)

    async def hold(self, reason: str, deadline: Deadline) -> None:
        """Nothing: requests for the adapter are refused, and others go on."""


class AdapterPort(Unpaused):
    """An adapter of a synchronous engine, such as ``LLM``."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine, self._name = engine, name

    def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine of this kind does not sleep."""
        return ""

    def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        error = None
        try:
            self._engine.update_adapter(self._name, update_info(order, deadline))
        except Exception as failure:  # noqa: BLE001 - told with what is served now
            error = named(failure)
        return serving_of(self._engine.status(), self._name, error)

    def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return self.apply(order.way_back(), deadline)

    def name(self, version: str, deadline: Deadline) -> None:
        """Nothing: the update named it."""

    def serving(self, deadline: Deadline) -> Serving:
        return serving_of(self._engine.status(), self._name, None)

    def hold(self, reason: str, deadline: Deadline) -> None:
        """Nothing: requests for the adapter are refused, and others go on."""


def serving_of(status: Any, name: str, error: Exception | None) -> Serving:
    """What an engine's status says of an adapter."""
    served = status.adapters.get(name)
    if served is None:
        return Serving(version=None, error=error or EngineError(f"the engine has no adapter {name!r}"))
    unfit = f"the adapter {name!r} is of no version: a commit failed half-way" if served.dirty else ""
    return Serving(version=served.weight_version, unfit=unfit, error=error)
