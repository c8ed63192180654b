"""Clients for vLLM engine objects, told by their methods: nothing of vLLM is imported."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import (
    Callable,
    Mapping,
    Sequence,
)
from typing import Any, Protocol, TypeVar, runtime_checkable

from weightcast.commit.joining import join, joining
from weightcast.commit.order import RoundAnswer, RoundOrder
from weightcast.commit.shells import AsyncCommitter
from weightcast.commit.stock import GONE_HINT, StockPort
from weightcast.commit.worker_outcome import WorkerOutcome, first_error
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, WeightcastError
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.helper import Helper
from weightcast.trainer.clients.in_loop import LoopCalls
from weightcast.trainer.clients.orders import round_order, way_back
from weightcast.trainer.clients.rpc import RpcEngineClient, status_of
from weightcast.vllm_protocol.eras import (
    may_sleep,
    offline_engine,
    require_backend,
    require_sleep_mode,
    served_engine,
)

T = TypeVar("T")

_numbers = itertools.count()


@runtime_checkable
class OfflineEngine(Protocol):
    """The part of vLLM's ``LLM`` that is used, but for ``update_weight_version``, which older ones lack."""

    def get_world_size(self) -> int: ...
    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]: ...
    def reset_prefix_cache(self) -> bool: ...


class VllmClient(RpcEngineClient):
    """Calls a ``vllm.LLM`` of this process. The LLM has no requests in flight while the client calls it, and takes none while it is held.

    A thread of the client's own carries out calls, so that workers that hang do not block the trainer. When the only worker runs in this
    very process, the caller's thread carries out calls: the model runs on the streams of that thread, and the worker waits only for
    the trainer, whose messages have deadlines of their own.
    """

    kind = "vllm"
    host = "127.0.0.1"
    pause_forgets = False

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine, self.target = offline_engine(engine), engine
        self.name = f"vllm-{next(_numbers)}"
        self._helper = Helper(self.name)

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        require_backend(self._engine.config)
        super().init(init_info, deadline)

    def may_sleep(self) -> bool:
        return may_sleep(self._engine.config)

    def require_sleep_mode(self) -> None:
        require_sleep_mode(self._engine.config, self.name)

    def wake_up(self, tags: Sequence[str], deadline: Deadline) -> None:
        self._run(lambda: self._engine.wake_up(tags), deadline)

    def world_size(self, deadline: Deadline) -> int:
        return self._run(self._engine.world_size, deadline)

    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        return self._run(lambda: self._engine.call_workers(action, payload), deadline)

    def is_paused(self, deadline: Deadline) -> bool:
        return self._engine.refuses

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        """Do nothing: no step runs between calls of an LLM."""

    def hold(self, reason: str, deadline: Deadline) -> None:
        self._engine.refuse(reason)

    def resume(self, deadline: Deadline) -> None:
        self._engine.accept()

    def forget_cache(self, deadline: Deadline) -> None:
        self._run(self._engine.forget_cache, deadline)

    def name_version(self, version: str, deadline: Deadline) -> None:
        self._run(lambda: self._engine.set_label(version), deadline)

    def close(self) -> None:
        super().close()
        self._helper.close()

    def _carry_out(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        if self._engine.computes_here:
            return _named(lambda: self._committer_of().carry_out(order, deadline), self.name)
        return super()._carry_out(order, deadline)

    def _run(self, work: Callable[[], T], deadline: Deadline) -> T:
        if self._engine.computes_here:
            deadline.check("the engine's turn")
            return _named(work, self.name)
        return self._helper.run(lambda: _named(work, self.name), deadline)


class AsyncVllmClient(EngineClient):
    """Calls a ``vllm.AsyncLLM`` whose event loop runs on another thread than the Publisher's calls."""

    kind = "vllm"
    host = "127.0.0.1"

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._port, self.target = StockPort(served_engine(engine)), engine
        self.name = f"vllm-async-{next(_numbers)}"
        self._calls = LoopCalls(loop, self.name)
        self._committer = AsyncCommitter(self._port)

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        steps = joining(init_info, self.world_size(deadline))
        try:
            join(steps, lambda action, payload: self._ask(action, payload, deadline), deadline)
        except WeightcastError as error:
            raise error.at(engine=self.name) from None

    def world_size(self, deadline: Deadline) -> int:
        return self._port.engine.world_size()

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(phases=self._calls.carry_out(self._committer, round_order(order, deadline), deadline).phases)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._calls.carry_out(self._committer, way_back(epoch, round, deadline), deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return status_of(self._ask("status", {}, deadline))

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        asleep: tuple[str, ...] = _named(lambda: self._calls.run(self._port.wake(tags), deadline), self.name)
        return asleep

    def shutdown(self, deadline: Deadline) -> None:
        self._raise_first(self._ask("shutdown", {}, deadline))

    def _ask(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[WorkerOutcome]:
        outcomes: list[WorkerOutcome] = _named(
            lambda: self._calls.run(self._port.ask(action, payload), deadline), self.name
        )
        return outcomes

    def _raise_first(self, outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error.at(engine=self.name)


def _named(work: Callable[[], T], engine: str) -> T:
    """``work``; what vLLM raises becomes EngineError, so that a round that it ends says which engine it was."""
    try:
        return work()
    except WeightcastError as error:
        error.at(engine=engine)
        raise
    except Exception as error:
        hint = GONE_HINT if type(error).__name__ == "EngineDeadError" else None
        raise EngineError(f"vLLM raised {type(error).__name__}: {error}", engine=engine, hint=hint) from error
