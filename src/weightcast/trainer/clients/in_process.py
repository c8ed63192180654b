"""InProcessEngineClient: an engine object in this very process, called by vLLM's method names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Protocol

from weightcast.commit.adapters import AdapterPort
from weightcast.commit.engines import EnginePort, ServedWeights
from weightcast.commit.order import RoundAnswer, RoundOrder
from weightcast.commit.shells import Committer
from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.helper import Helper
from weightcast.trainer.clients.orders import round_order, told_of, way_back

_numbers = itertools.count()


class SyncEngine(Protocol):
    """The methods of an engine object that weight sync calls, under vLLM's names. weightcast's embedded ``LLM`` has them."""

    def get_world_size(self) -> int: ...
    def init_weight_transfer_engine(self, init_info: Any, /) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any, /) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
    def status(self) -> ServedWeights: ...
    def is_paused(self) -> bool: ...
    def pause_generation(self, mode: Any, clear_cache: bool, /) -> None: ...
    def resume_generation(self) -> None: ...
    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool: ...


class InProcessEngineClient(EngineClient):
    """Calls an LLM object on a thread of the client's own, so that an engine that hangs does not block the trainer.

    A pause runs on a second thread: when the pause takes too long, the first thread takes it back.
    """

    kind = "in-process"
    host = "127.0.0.1"

    def __init__(self, engine: SyncEngine) -> None:
        self._engine = self.target = engine
        self.name = f"in-process-{next(_numbers)}"
        self._helper = Helper(self.name)
        self._pauser = Helper(f"{self.name}-pause")
        self._committer = Committer(EnginePort(engine, self._pauser.run))

    def for_adapter(self, name: str) -> None:
        if not hasattr(self._engine, "update_adapter"):
            super().for_adapter(name)
        self.adapter, self._committer = name, Committer(AdapterPort(self._engine, name))

    def world_size(self, deadline: Deadline) -> int:
        return self._helper.run(self._engine.get_world_size, deadline)

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        info = {"init_info": dict(init_info)}
        self._helper.run(lambda: self._engine.init_weight_transfer_engine(info), deadline)

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(phases=self._carry_out(round_order(order, deadline, self.adapter), deadline).phases)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._carry_out(way_back(epoch, round, deadline, self.adapter), deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status = self._helper.run(self._engine.status, deadline)
        return told_of(status, self.adapter)

    def close(self) -> None:
        self._helper.close()
        self._pauser.close()

    def _carry_out(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        """An order that began is carried out to its end, whoever still waits for it."""
        try:
            return self._helper.run(lambda: self._committer.carry_out(order, deadline), deadline)
        except WeightcastError as error:
            error.at(engine=self.name)
            raise
