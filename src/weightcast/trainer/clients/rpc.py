"""RpcEngineClient: an engine whose workers are reached by one remote call (vLLM's collective_rpc) and never raise.

Load-bearing: a version is named only after every worker said that it serves it, and when one could not, the others are taken
back before the engine goes on. An engine whose weights are of no version, or of several, is held, and its workers keep in mind
that weightcast held it: the next update that succeeds lets it go on, whoever publishes it. A pause of the engine's owner is left
as it was. What this client paused it lets go on with time of its own, because the round's may be what has run out; when it
cannot, the next call that reaches the engine does.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.outcome import WorkerOutcome, common_version, first_error, outcomes_from, require_all, why_unfit
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient

logger = logging.getLogger(__name__)

AFTER_S = 1.0
"""What letting an engine go on may last beyond the deadline of its round."""


class RpcEngineClient(EngineClient):
    """Subclasses say how to call, pause and resume; the order of things is here."""

    _owes = False
    """This client paused the engine and has neither let it go on nor held it."""
    _size = 0

    @abstractmethod
    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        """``weightcast_call(action, payload)`` in each worker; the workers' answers."""

    @abstractmethod
    def is_paused(self, deadline: Deadline) -> bool: ...

    @abstractmethod
    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        """Stop stepping, and with ``clear_cache`` forget keys and values; nothing where calls and steps never overlap."""

    @abstractmethod
    def hold(self, reason: str, deadline: Deadline) -> None:
        """See to it that nothing is computed until ``resume``; idempotent."""

    @abstractmethod
    def resume(self, deadline: Deadline) -> None:
        """Undo ``pause`` and ``hold``; idempotent."""

    @abstractmethod
    def forget_cache(self, deadline: Deadline) -> None:
        """Drop cached keys and values, those of requests in flight, too; EngineError when the engine keeps them."""

    @abstractmethod
    def name_version(self, version: str, deadline: Deadline) -> None:
        """Label what the engine's outputs are made with."""

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        size = self._num_workers(deadline)
        self._raise_first(self._ask("init", {"init_info": dict(init_info), "world_size": size}, deadline))

    def shutdown(self, deadline: Deadline) -> None:
        self._raise_first(self._ask("shutdown", {}, deadline))

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        outcomes = self._ask("status", {}, deadline)
        dirty = bool(why_unfit(outcomes))
        first = outcomes[0]
        return {
            "weight_version": first.weight_version,
            "digest": first.digest or None,
            "dirty": dirty,
            "ready": not dirty,
        }

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return self._round("commit", order, deadline)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._round("rollback", CommitOrder(epoch=epoch, round=round, version=""), deadline)

    # -- one round

    def _round(self, action: str, order: CommitOrder, deadline: Deadline) -> CommitReply:
        start = time.perf_counter()
        held, theirs = self._who_paused(deadline)
        # Between two workers' commits no step may come in, and vLLM promises that only while it is paused.
        pauses = order.pause != "none" or held or self._num_workers(deadline) > 1
        try:
            if pauses:
                self._owes = self._owes or not (held or theirs)
                self.pause("keep" if order.pause == "none" else order.pause, order.clear_cache, deadline)
            at_rest = time.perf_counter()
            outcomes = self._update(action, order, deadline)
            if order.clear_cache:
                self.forget_cache(deadline)
            if not why_unfit(outcomes):
                self.name_version(common_version(outcomes), deadline)
            applied = time.perf_counter()
        except BaseException:
            self._let_go_on(theirs, None, _at_least(deadline))
            raise
        self._let_go_on(theirs, outcomes, _at_least(deadline))
        end = time.perf_counter()
        return CommitReply(phases={"pause": at_rest - start, "apply": applied - at_rest, "resume": end - applied})

    def _update(self, action: str, order: CommitOrder, deadline: Deadline) -> list[WorkerOutcome]:
        payload = {"epoch": order.epoch, "round": order.round, "timeout_s": deadline.limit_s()}
        version = {"version": order.version} if order.version else {}
        outcomes = self._ask("update", {**payload, **version, "action": action}, deadline)
        error = first_error(outcomes)
        if error is not None:
            if action == "commit" and any(outcome.error is None for outcome in outcomes):
                self._ask("update", {**payload, "action": "rollback"}, deadline)
            raise error.at(engine=self.name)
        return outcomes

    def _who_paused(self, deadline: Deadline) -> tuple[bool, bool]:
        """Whether the engine stands still because of weightcast, and whether it does because of somebody else."""
        if not self.is_paused(deadline):
            self._owes = False
            return False, False
        held = self._owes or any(outcome.held for outcome in self._ask("status", {}, deadline))
        return held, not held

    def _let_go_on(self, theirs: bool, outcomes: list[WorkerOutcome] | None, deadline: Deadline) -> None:
        """End the round's pause, unless it is somebody else's; hold the engine if its weights are of no version or of several.

        ``outcomes`` are asked for where they are None, after a failure, which is on its way to the caller: so this never raises then.
        """
        known = outcomes is not None
        try:
            outcomes = outcomes or self._ask("status", {}, deadline)
            reason = why_unfit(outcomes)
            if reason and not theirs:
                logger.error("%s: %s: generation stays paused until an update succeeds", self.name, reason)
                self.hold(f"the engine is held: {reason}", deadline)
                self._ask("hold", {"held": True}, deadline)
            elif not reason and not theirs:
                was_held = any(outcome.held for outcome in outcomes)
                if self._owes or was_held:
                    self.resume(deadline)
                if was_held:
                    self._ask("hold", {"held": False}, deadline)
            self._owes = False
        except WeightcastError as error:
            if known:
                raise
            logger.warning("%s: it is not known what the engine serves, so it stays as it is: %s", self.name, error)

    # -- pieces

    def _ask(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[WorkerOutcome]:
        outcomes = outcomes_from(self.call_workers(action, dict(payload), deadline))
        require_all(outcomes, self._num_workers(deadline))
        return outcomes

    def _num_workers(self, deadline: Deadline) -> int:
        self._size = self._size or self.world_size(deadline)
        return self._size

    def _raise_first(self, outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error.at(engine=self.name)


def _at_least(deadline: Deadline) -> Deadline:
    return Deadline(max(deadline.remaining_s(), AFTER_S))
