"""InProcessEngineClient: an engine object in this very process, called by vLLM's method names."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, Protocol

from weightcast.deadline import Deadline
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient

_numbers = itertools.count()


class SyncEngine(Protocol):
    """The part of vLLM's ``LLM`` that weight sync needs; weightcast's embedded LLM has it."""

    def get_world_size(self) -> int: ...
    def init_weight_transfer_engine(self, init_info: Any, /) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any, /) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
    def shutdown_weight_transfer_engine(self) -> None: ...
    def get_weight_version(self) -> str: ...
    def reset_prefix_cache(self) -> bool: ...


class InProcessEngineClient(EngineClient):
    """Drives an LLM object. Its calls block for as long as the engine takes; the deadline travels with them."""

    kind = "in-process"
    host = "127.0.0.1"

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine
        self.name = f"in-process-{next(_numbers)}"

    def world_size(self, deadline: Deadline) -> int:
        return self._engine.get_world_size()

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._engine.init_weight_transfer_engine({"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        start = time.perf_counter()
        self._update(order.epoch, order.round, "commit", deadline, order.version)
        if order.clear_cache:
            self._engine.reset_prefix_cache()
        return CommitReply(phases={"apply": time.perf_counter() - start})

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._update(epoch, round, "rollback", deadline, None)
        self._engine.reset_prefix_cache()

    def _update(self, epoch: int, round: int, action: str, deadline: Deadline, version: str | None) -> None:
        self._engine.start_weight_update()
        info = {"epoch": epoch, "round": round, "action": action, "timeout_s": max(deadline.remaining_s(), 0.001)}
        self._engine.update_weights({"update_info": info})
        self._engine.finish_weight_update(version)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return {"weight_version": self._engine.get_weight_version(), "digest": None, "dirty": False, "ready": True}

    def shutdown(self, deadline: Deadline) -> None:
        self._engine.shutdown_weight_transfer_engine()
