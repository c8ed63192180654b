"""RpcEngineClient: an engine whose workers are reached by one remote call (vLLM's collective_rpc) and never raise.

Load-bearing: a version is named only after every worker said that it serves it, and when one could not, the others are taken
back before the engine goes on. An engine with a dirty worker stays paused.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from weightcast.deadline import Deadline
from weightcast.outcome import WorkerOutcome, common_version, first_error, outcomes_from
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient

CALL = "weightcast_call"


class RpcEngineClient(EngineClient):
    """Subclasses say how to call, pause and resume; the order of things is here."""

    @abstractmethod
    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        """``weightcast_call(action, payload)`` in each worker; the workers' answers."""

    @abstractmethod
    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> bool:
        """Stop stepping and return whether that has to be undone; False where calls and steps never overlap."""

    @abstractmethod
    def resume(self, deadline: Deadline) -> None: ...

    @abstractmethod
    def forget_cache(self, deadline: Deadline) -> None:
        """Drop cached keys and values of finished requests."""

    @abstractmethod
    def name_version(self, version: str, deadline: Deadline) -> None:
        """Label what the engine's outputs are made with."""

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        size = self.world_size(deadline)
        self._all("init", {"init_info": dict(init_info), "world_size": size}, deadline)

    def shutdown(self, deadline: Deadline) -> None:
        self._all("shutdown", {}, deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        outcomes = outcomes_from(self.call_workers("status", {}, deadline))
        dirty = any(outcome.dirty for outcome in outcomes)
        version = outcomes[0].weight_version if dirty else common_version(outcomes)
        return {"weight_version": version, "digest": outcomes[0].digest or None, "dirty": dirty, "ready": not dirty}

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return self._round("commit", order, deadline)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._round("rollback", CommitOrder(epoch=epoch, round=round, version=""), deadline)

    def _round(self, action: str, order: CommitOrder, deadline: Deadline) -> CommitReply:
        start = time.perf_counter()
        paused = order.pause != "none" and self.pause(order.pause, order.clear_cache, deadline)
        at_rest = time.perf_counter()
        applied, dirty = at_rest, True
        try:
            outcomes = self._update(action, order, deadline)
            if order.clear_cache:
                self.forget_cache(deadline)
            self.name_version(common_version(outcomes), deadline)
            applied, dirty = time.perf_counter(), False
        except Exception:
            dirty = any(outcome.dirty for outcome in outcomes_from(self.call_workers("status", {}, deadline)))
            raise
        finally:
            if paused and not dirty:
                self.resume(deadline)
        end = time.perf_counter()
        return CommitReply(phases={"pause": at_rest - start, "apply": applied - at_rest, "resume": end - applied})

    def _update(self, action: str, order: CommitOrder, deadline: Deadline) -> list[WorkerOutcome]:
        payload = {"epoch": order.epoch, "round": order.round, "timeout_s": max(deadline.remaining_s(), 0.001)}
        version = {"version": order.version} if order.version else {}
        outcomes = outcomes_from(self.call_workers("update", {**payload, **version, "action": action}, deadline))
        error = first_error(outcomes)
        if error is not None:
            if action == "commit" and not any(outcome.dirty for outcome in outcomes):
                self.call_workers("update", {**payload, "action": "rollback"}, deadline)
            raise error.at(engine=self.name)
        return outcomes

    def _all(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> None:
        error = first_error(outcomes_from(self.call_workers(action, dict(payload), deadline)))
        if error is not None:
            raise error.at(engine=self.name)
