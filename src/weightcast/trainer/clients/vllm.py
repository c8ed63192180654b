"""Clients for vLLM engine objects, told by their methods: nothing of vLLM is imported."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from weightcast.deadline import Deadline
from weightcast.trainer.clients.in_loop import LoopCalls
from weightcast.trainer.clients.rpc import CALL, RpcEngineClient

_numbers = itertools.count()


@runtime_checkable
class OfflineEngine(Protocol):
    """The part of vLLM's ``LLM`` that is used, but for ``update_weight_version``, which older ones lack."""

    def get_world_size(self) -> int: ...
    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]: ...
    def reset_prefix_cache(self) -> bool: ...


class VllmClient(RpcEngineClient):
    """A ``vllm.LLM`` of this process. It has no requests in flight while it is called."""

    kind = "vllm"
    host = "127.0.0.1"

    def __init__(self, engine: OfflineEngine) -> None:
        self._engine = engine
        self.name = f"vllm-{next(_numbers)}"

    def world_size(self, deadline: Deadline) -> int:
        return self._engine.get_world_size()

    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        return self._engine.collective_rpc(CALL, args=(action, dict(payload)))

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> bool:
        return False

    def resume(self, deadline: Deadline) -> None:
        return

    def forget_cache(self, deadline: Deadline) -> None:
        self._engine.reset_prefix_cache()

    def name_version(self, version: str, deadline: Deadline) -> None:
        # vLLM before 0.28 has no label for its outputs' weights; the workers know their version all the same.
        label = getattr(self._engine, "update_weight_version", None)
        if label is not None:
            label(version)


class AsyncVllmClient(RpcEngineClient):
    """A ``vllm.AsyncLLM`` whose event loop runs on another thread than the Publisher's."""

    kind = "vllm"
    host = "127.0.0.1"

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self.name = f"vllm-async-{next(_numbers)}"
        self._calls = LoopCalls(loop, self.name)

    def world_size(self, deadline: Deadline) -> int:
        return int(self._engine.vllm_config.parallel_config.world_size_across_dp)

    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        answers: list[Any] = self._calls.run(self._engine.collective_rpc(CALL, args=(action, dict(payload))), deadline)
        return answers

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> bool:
        if self._calls.run(self._engine.is_paused(), deadline):
            return False
        self._calls.run(self._engine.pause_generation(mode=mode, clear_cache=clear_cache), deadline)
        return True

    def resume(self, deadline: Deadline) -> None:
        self._calls.run(self._engine.resume_generation(), deadline)

    def forget_cache(self, deadline: Deadline) -> None:
        self._calls.run(self._engine.reset_prefix_cache(), deadline)

    def name_version(self, version: str, deadline: Deadline) -> None:
        label = getattr(self._engine, "update_weight_version", None)
        if label is not None:
            self._calls.run(label(version), deadline)
