"""StockClient: calls a stock engine's object of this process (see commit.stock), whose coroutines run on an event loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from weightcast.commit.joining import join, joining
from weightcast.commit.shells import AsyncCommitter
from weightcast.commit.stock import GONE_HINT, StockEngine, StockPort
from weightcast.commit.stock_adapters import StockAdapterPort
from weightcast.commit.worker_outcome import WorkerOutcome, first_error
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, WeightcastError
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.in_loop import LoopCalls
from weightcast.trainer.clients.orders import round_order, way_back
from weightcast.trainer.clients.rpc import status_of

T = TypeVar("T")


class StockClient(EngineClient):
    """Calls an engine on its event loop, while the Publisher's calls come from other threads."""

    host = "127.0.0.1"

    def __init__(self, engine: StockEngine, calls: LoopCalls, name: str, target: Any) -> None:
        """``target`` is the object that the user gave."""
        self._port, self.target = StockPort(engine), target
        self.name = name
        self._calls = calls
        self._committer = AsyncCommitter(self._port)
        self._about: StockPort | StockAdapterPort = self._port

    def for_adapter(self, name: str) -> None:
        try:
            self._port.engine.require_adapters()
        except WeightcastError as error:
            raise error.at(engine=self.name) from None
        self.adapter, self._about = name, StockAdapterPort(self._port.engine, name)
        self._committer = AsyncCommitter(self._about)

    def check_caller(self) -> None:
        self._calls.check_caller()

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        steps = joining(init_info, self.world_size(deadline))
        try:
            join(steps, lambda action, payload: self._ask(action, payload, deadline), deadline)
        except WeightcastError as error:
            raise error.at(engine=self.name) from None

    def world_size(self, deadline: Deadline) -> int:
        return self._port.engine.world_size()

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(
            phases=self._calls.carry_out(self._committer, round_order(order, deadline, self.adapter), deadline).phases
        )

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._calls.carry_out(self._committer, way_back(epoch, round, deadline, self.adapter), deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return status_of(self._ask("status", {}, deadline))

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        asleep: tuple[str, ...] = self._named(lambda: self._calls.run(self._port.wake(tags), deadline))
        return asleep

    def shutdown(self, deadline: Deadline) -> None:
        error = first_error(self._ask("shutdown", {}, deadline))
        if error is not None:
            raise error.at(engine=self.name)

    def _ask(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[WorkerOutcome]:
        outcomes: list[WorkerOutcome] = self._named(lambda: self._calls.run(self._about.ask(action, payload), deadline))
        return outcomes

    def _named(self, work: Callable[[], T]) -> T:
        return named(work, self._port.engine.product, self.name)


def named(work: Callable[[], T], product: str, engine: str) -> T:
    """``work``; what the engine raises becomes EngineError, so that a round that it ends says which engine it was."""
    try:
        return work()
    except WeightcastError as error:
        error.at(engine=engine)
        raise
    except Exception as error:
        hint = GONE_HINT if type(error).__name__ == "EngineDeadError" else None
        raise EngineError(f"{product} raised {type(error).__name__}: {error}", engine=engine, hint=hint) from error
