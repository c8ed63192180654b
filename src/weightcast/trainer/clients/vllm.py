"""Clients for vLLM engine objects, told by their methods: nothing of vLLM is imported."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import (
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from typing import Any, Protocol, TypeVar, runtime_checkable

from weightcast.commit.order import RoundAnswer, RoundOrder
from weightcast.deadline import Deadline
from weightcast.trainer.clients.helper import Helper
from weightcast.trainer.clients.in_loop import LoopCalls
from weightcast.trainer.clients.rpc import RpcEngineClient
from weightcast.trainer.clients.stock import StockClient, named
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

    def for_adapter(self, name: str) -> None:
        _named(self._engine.require_adapters, self.name)
        self.adapter = name

    def call_about_adapter(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        return self._run(lambda: self._engine.call_about_adapter(action, payload), deadline)

    def point(self, name: str, label: str, ids: Mapping[str, int], deadline: Deadline) -> None:
        self._engine.point(name, label, ids)

    def retire(self, name: str, there: Collection[str]) -> None:
        self._engine.retire(name, there)

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


class AsyncVllmClient(StockClient):
    """Calls a ``vllm.AsyncLLM`` whose event loop runs on another thread than the Publisher's calls."""

    kind = "vllm"

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        name = f"vllm-async-{next(_numbers)}"
        super().__init__(served_engine(engine), LoopCalls(loop, name), name, engine)


def _named(work: Callable[[], T], engine: str) -> T:
    return named(work, "vLLM", engine)
