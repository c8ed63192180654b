"""InProcessEngineClient: an engine object in this very process, called by vLLM's method names."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, Protocol

from weightcast.deadline import Deadline
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.helper import Helper

_numbers = itertools.count()


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


class SyncEngine(Protocol):
    """What weight sync needs of an engine object, by vLLM's names, and whether its weights are clean; weightcast's embedded LLM
    has it."""

    def get_world_size(self) -> int: ...
    def init_weight_transfer_engine(self, init_info: Any, /) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any, /) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
    def shutdown_weight_transfer_engine(self) -> None: ...
    def status(self) -> ServedWeights: ...
    def reset_prefix_cache(self) -> bool: ...


class InProcessEngineClient(EngineClient):
    """Drives an LLM object, from a thread of the client's own: an engine that hangs must not take the trainer with it."""

    kind = "in-process"
    host = "127.0.0.1"

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = engine
        self.name = f"in-process-{next(_numbers)}"
        self._helper = Helper(self.name)

    def world_size(self, deadline: Deadline) -> int:
        return self._helper.run(self._engine.get_world_size, deadline)

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        info = {"init_info": dict(init_info)}
        self._helper.run(lambda: self._engine.init_weight_transfer_engine(info), deadline)

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        start = time.perf_counter()
        self._update("commit", order, deadline)
        return CommitReply(phases={"apply": time.perf_counter() - start})

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._update("rollback", CommitOrder(epoch=epoch, round=round, version=""), deadline)

    def _update(self, action: str, order: CommitOrder, deadline: Deadline) -> None:
        """In one piece: an update that was begun is finished, too, whoever still waits for it."""

        def work() -> None:
            deadline.check("the engine's turn")
            self._engine.start_weight_update()
            info = {
                "epoch": order.epoch,
                "round": order.round,
                "action": action,
                "timeout_s": deadline.limit_s(),
            }
            self._engine.update_weights({"update_info": info})
            self._engine.finish_weight_update(order.version or None)
            if order.clear_cache:
                self._engine.reset_prefix_cache()

        self._helper.run(work, deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status = self._helper.run(self._engine.status, deadline)
        return {
            "weight_version": status.weight_version,
            "digest": status.digest,
            "dirty": status.dirty,
            "ready": status.ready,
        }

    def shutdown(self, deadline: Deadline) -> None:
        self._helper.run(self._engine.shutdown_weight_transfer_engine, deadline)

    def close(self) -> None:
        self._helper.close()
