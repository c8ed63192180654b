"""Clients for asynchronous engines of this process: their calls run on the engine's event loop, the Publisher on another thread."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from weightcast.commit.adapters import AsyncAdapterPort
from weightcast.commit.engines import AsyncEnginePort
from weightcast.commit.order import RoundAnswer, RoundOrder
from weightcast.commit.shells import AsyncCommitter
from weightcast.deadline import LEAST_S, Deadline, result_within
from weightcast.errors import DeadlineExceeded, StateError, WeightcastError
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.orders import round_order, told_of, way_back

_numbers = itertools.count()


EARLIER_S = 0.02
"""An order ends by itself before the wait for it does: its error says more."""


class LoopCalls:
    """Runs an engine's coroutines on its event loop, each within a deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop, self._name = loop, name

    def check_caller(self) -> None:
        """Raise StateError on the loop's own thread."""
        if running_loop() is self._loop:
            raise blocks_a_loop("this would block the event loop that the engine runs on", self._name)

    def run(self, work: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        """Wait for ``work``; StateError on the loop's own thread, which would wait for itself."""
        try:
            self.check_caller()
        except StateError:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, self._loop)

        def late() -> DeadlineExceeded:
            future.cancel()
            return deadline.exceeded(
                "the call to the engine",
                engine=self._name,
                hint="Does something block its event loop? From a coroutine: await asyncio.to_thread(publisher.publish). If the engine is only slow, give more timeout_s",
            )

        return result_within(future, deadline, late)

    def carry_out(self, committer: AsyncCommitter, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        """Wait for an order. One that began runs to its end on the loop, whoever still waits for it."""
        order = replace(order, timeout_s=max(order.timeout_s - EARLIER_S, LEAST_S))
        try:
            answer: RoundAnswer = self.run(committer.carry_out(order), deadline)
        except WeightcastError as error:
            error.at(engine=self._name)
            raise
        return answer


class AsyncEngineClient(EngineClient):
    """weightcast's ``AsyncLLM``, or any engine with vLLM's names for pausing and weight transfer."""

    kind = "in-process"
    host = "127.0.0.1"

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = self.target = engine
        self.name = f"async-{next(_numbers)}"
        self._calls = LoopCalls(loop, self.name)
        self._committer = AsyncCommitter(AsyncEnginePort(engine, wrapped=True))

    def check_caller(self) -> None:
        self._calls.check_caller()

    def for_adapter(self, name: str) -> None:
        if not hasattr(self._engine, "update_adapter"):
            super().for_adapter(name)
        self.adapter, self._committer = name, AsyncCommitter(AsyncAdapterPort(self._engine, name))

    def world_size(self, deadline: Deadline) -> int:
        return int(self._calls.run(self._engine.get_world_size(), deadline))

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._calls.run(self._engine.init_weight_transfer_engine({"init_info": dict(init_info)}), deadline)

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(
            phases=self._calls.carry_out(self._committer, round_order(order, deadline, self.adapter), deadline).phases
        )

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._calls.carry_out(self._committer, way_back(epoch, round, deadline, self.adapter), deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status = self._calls.run(self._engine.status(), deadline)
        return told_of(status, self.adapter)


def blocks_a_loop(reason: str, engine: str) -> StateError:
    """The error of a call that would block an event loop."""
    return StateError(reason, engine=engine, hint="await asyncio.to_thread(publisher.publish)")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
