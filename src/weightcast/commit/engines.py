"""Ports of engine objects with vLLM's names for pausing and weight transfer, such as the embedded engine's.

An engine of this kind refuses requests by itself while its weights are of no version, so a pause need not hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from weightcast.commit.order import RoundOrder, Serving, Standing
from weightcast.commit.updates import call, call_now, named, update_calls, update_info
from weightcast.deadline import Deadline
from weightcast.errors import EngineError


class ServedWeights(Protocol):
    """What an engine says of itself: engines.base.EngineStatus, or anything with these."""

    @property
    def weight_version(self) -> str: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def dirty(self) -> bool: ...
    @property
    def ready(self) -> bool: ...


class AsyncEnginePort:
    """An asynchronous engine, ``AsyncLLM`` or any InferenceEngine. ``wrapped``: updates are given as ``{"update_info": ...}``."""

    def __init__(self, engine: Any, *, wrapped: bool) -> None:
        self._engine, self._wrapped = engine, wrapped

    async def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine of this kind does not sleep."""
        return ""

    async def standing(self, deadline: Deadline) -> Standing:
        return Standing(paused=bool(await self._engine.is_paused()))

    async def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        await self._engine.pause_generation(mode, clear_cache)

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        error = None
        try:
            await call(self._engine, update_calls(_told(order, deadline, self._wrapped), order.version or None))
        except Exception as failure:  # noqa: BLE001 - told with what is served now
            error = named(failure)
        return _serving(await self._engine.status(), error)

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return await self.apply(order.way_back(), deadline)

    async def forget(self, deadline: Deadline) -> None:
        if not await self._engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(NOT_FORGOTTEN)

    async def name(self, version: str, deadline: Deadline) -> None:
        """Nothing: the finish of the update named it."""

    async def serving(self, deadline: Deadline) -> Serving:
        return _serving(await self._engine.status(), None)

    async def hold(self, reason: str, deadline: Deadline) -> None:
        await self._engine.resume_generation()

    async def resume(self, was_held: bool, deadline: Deadline) -> None:
        await self._engine.resume_generation()


class EnginePort:
    """A synchronous engine, such as ``LLM``. ``within`` makes a call that may take longer than its deadline, on another thread."""

    def __init__(self, engine: Any, within: Callable[[Callable[[], Any], Deadline], Any]) -> None:
        self._engine, self._within = engine, within

    def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine of this kind does not sleep."""
        return ""

    def standing(self, deadline: Deadline) -> Standing:
        return Standing(paused=bool(self._engine.is_paused()))

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        self._within(lambda: self._engine.pause_generation(mode, clear_cache), deadline)

    def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        error = None
        try:
            call_now(self._engine, update_calls(_told(order, deadline, True), order.version or None))
        except Exception as failure:  # noqa: BLE001 - told with what is served now
            error = named(failure)
        return _serving(self._engine.status(), error)

    def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return self.apply(order.way_back(), deadline)

    def forget(self, deadline: Deadline) -> None:
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(NOT_FORGOTTEN)

    def name(self, version: str, deadline: Deadline) -> None:
        """Nothing: the finish of the update named it."""

    def serving(self, deadline: Deadline) -> Serving:
        return _serving(self._engine.status(), None)

    def hold(self, reason: str, deadline: Deadline) -> None:
        self._engine.resume_generation()

    def resume(self, was_held: bool, deadline: Deadline) -> None:
        self._engine.resume_generation()


NOT_FORGOTTEN = "the engine keeps keys and values that former weights computed"


def _told(order: RoundOrder, deadline: Deadline, wrapped: bool) -> dict[str, Any]:
    info = update_info(order, deadline)
    return {"update_info": info} if wrapped else info


def _serving(status: ServedWeights, error: Exception | None) -> Serving:
    unfit = "the weights are of no version: an update failed half-way" if status.dirty else ""
    return Serving(version=status.weight_version, unfit=unfit, error=error)
