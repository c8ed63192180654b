"""RpcEngineClient: an engine whose workers are reached by one remote call (vLLM's collective_rpc) and never raise.

An engine whose weights are of no version, or of several, is held: it computes nothing. Its workers remember that weightcast held the
engine, and the next update that succeeds lets the engine go on, whichever trainer publishes it. ``commit.machine`` has the order of steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import (
    Collection,
    Mapping,
    Sequence,
)
from typing import Any

from weightcast.commit.adapters import Unpaused
from weightcast.commit.joining import join, joining
from weightcast.commit.order import RoundAnswer, RoundOrder, Serving, Standing
from weightcast.commit.shells import Committer
from weightcast.commit.stock_adapters import ids_of, standing_for
from weightcast.commit.updates import update_info
from weightcast.commit.worker_outcome import (
    WorkerOutcome,
    asleep_tags,
    first_error,
    outcomes_from,
    require_all,
    tags_to_wake,
    why_asleep,
    why_unfit,
)
from weightcast.deadline import Deadline
from weightcast.errors import (
    MERGED_HINT,
    Unsupported,
    WeightcastError,
)
from weightcast.trainer.clients.base import (
    CANNOT_SLEEP_HINT,
    CommitOrder,
    CommitReply,
    EngineClient,
)
from weightcast.trainer.clients.helper import Helper
from weightcast.trainer.clients.orders import round_order, way_back


class RpcEngineClient(EngineClient):
    """A client over one remote call to all workers. Subclasses implement call, pause and resume, and set ``name`` before any call."""

    pause_forgets = True
    """``pause`` with ``clear_cache`` drops keys and values, or raises."""
    _size = 0
    _committer: Committer | None = None
    _orders: Helper | None = None

    @abstractmethod
    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        """Call ``weightcast_call(action, payload)`` in each worker and return the workers' answers."""

    def call_about_adapter(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        """``call_workers`` about an adapter, for clients that have adapters."""
        raise Unsupported(f"an engine of kind {self.kind} has no adapters", engine=self.name, hint=MERGED_HINT)

    def point(self, name: str, label: str, ids: Mapping[str, int], deadline: Deadline) -> None:
        """Have requests for an adapter run on a version from now on; see commit.stock.StockEngine.point."""
        raise Unsupported(f"an engine of kind {self.kind} has no adapters", engine=self.name, hint=MERGED_HINT)

    def retire(self, name: str, there: Collection[str]) -> None:
        """Take no request for a version of an adapter that is not ``there``. No request is taken while the client calls."""
        raise Unsupported(f"an engine of kind {self.kind} has no adapters", engine=self.name, hint=MERGED_HINT)

    @abstractmethod
    def is_paused(self, deadline: Deadline) -> bool: ...

    @abstractmethod
    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        """Stop the engine's steps, and with ``clear_cache`` forget keys and values. A client whose calls and steps never overlap does
        nothing."""

    @abstractmethod
    def hold(self, reason: str, deadline: Deadline) -> None:
        """Make sure that the engine computes nothing until ``resume``. A second call does nothing."""

    @abstractmethod
    def resume(self, deadline: Deadline) -> None:
        """Undo ``pause`` and ``hold``. A second call does nothing."""

    @abstractmethod
    def forget_cache(self, deadline: Deadline) -> None:
        """Drop cached keys and values, also those of requests in flight. EngineError when the engine keeps them."""

    @abstractmethod
    def name_version(self, version: str, deadline: Deadline) -> None:
        """Set the version that the engine's outputs carry."""

    def wake_up(self, tags: Sequence[str], deadline: Deadline) -> None:
        """vLLM's ``wake_up``. Unsupported unless the engine can sleep."""
        raise Unsupported(f"an engine of kind {self.kind} cannot sleep", engine=self.name, hint=CANNOT_SLEEP_HINT)

    def require_sleep_mode(self) -> None:
        """Raise Unsupported where it is known that the engine cannot sleep."""
        return

    def may_sleep(self) -> bool:
        """Say whether the engine may be asleep. When the client does not know, the workers of a sleeping engine refuse by themselves."""
        return False

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        steps = joining(init_info, self.num_workers(deadline))
        try:
            join(steps, lambda action, payload: self.ask(action, payload, deadline), deadline)
        except WeightcastError as error:
            raise error.at(engine=self.name) from None

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        outcomes = self.ask("status", {}, deadline)
        return status_of(outcomes)

    def shutdown(self, deadline: Deadline) -> None:
        self._raise_first(self.ask("shutdown", {}, deadline))

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        self.require_sleep_mode()
        wanted = tags_to_wake(self.ask("status", {}, deadline), tags)
        if wanted:
            self.wake_up(wanted, deadline)
        return asleep_tags(self.ask("status", {}, deadline))

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(phases=self._carry_out(round_order(order, deadline, self.adapter), deadline).phases)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._carry_out(way_back(epoch, round, deadline, self.adapter), deadline)

    def close(self) -> None:
        if self._orders is not None:
            self._orders.close()

    def ask(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[WorkerOutcome]:
        """Call all workers and decode their answers. Unsupported unless every worker answers."""
        if self.adapter:
            answers = self.call_about_adapter(action, {**payload, "adapter": self.adapter}, deadline)
        else:
            answers = self.call_workers(action, dict(payload), deadline)
        outcomes = outcomes_from(answers)
        require_all(outcomes, self.num_workers(deadline))
        if self.adapter:
            self.retire(self.adapter, ids_of(outcomes))
        return outcomes

    def num_workers(self, deadline: Deadline) -> int:
        self._size = self._size or self.world_size(deadline)
        return self._size

    def _carry_out(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        """On a thread of its own: an order that began is carried out to its end, whoever still waits for it."""
        committer = self._committer_of()
        if self._orders is None:
            self._orders = Helper(f"{self.name}-orders")
        try:
            return self._orders.run(lambda: committer.carry_out(order, deadline), deadline)
        except WeightcastError as error:
            error.at(engine=self.name)
            raise

    def _committer_of(self) -> Committer:
        if self._committer is None:
            self._committer = Committer(AdapterPort(self) if self.adapter else WorkersPort(self))
        return self._committer

    def _raise_first(self, outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error.at(engine=self.name)


class WorkersPort:
    """The steps of a commit over an RpcEngineClient's calls."""

    def __init__(self, client: RpcEngineClient) -> None:
        self._client = client

    def asleep(self, deadline: Deadline) -> str:
        """Workers say what vLLM has unmapped in them; an engine that cannot sleep is not asked."""
        return why_asleep(self._client.ask("status", {}, deadline)) if self._client.may_sleep() else ""

    def standing(self, deadline: Deadline) -> Standing:
        client = self._client
        must_pause = client.num_workers(deadline) > 1
        paused = client.is_paused(deadline)
        held = paused and any(outcome.held for outcome in client.ask("status", {}, deadline))
        return Standing(paused=paused, held=held, must_pause=must_pause, pause_forgets=client.pause_forgets)

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        self._client.pause(mode, clear_cache, deadline)

    def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return Serving.of(self._client.ask("update", update_info(order, deadline), deadline))

    def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return self.apply(way_back(order.epoch, order.round, deadline), deadline)

    def forget(self, deadline: Deadline) -> None:
        self._client.forget_cache(deadline)

    def name(self, version: str, deadline: Deadline) -> None:
        self._client.name_version(version, deadline)

    def serving(self, deadline: Deadline) -> Serving:
        return Serving.of(self._client.ask("status", {}, deadline))

    def hold(self, reason: str, deadline: Deadline) -> None:
        self._client.hold(reason, deadline)
        self._client.ask("hold", {"held": True}, deadline)

    def resume(self, was_held: bool, deadline: Deadline) -> None:
        self._client.resume(deadline)
        if was_held:
            self._client.ask("hold", {"held": False}, deadline)


class AdapterPort(Unpaused):
    """The steps of an adapter's commit over an RpcEngineClient's calls: the name moves when all workers have the version."""

    def __init__(self, client: RpcEngineClient) -> None:
        self._client = client

    def asleep(self, deadline: Deadline) -> str:
        """Nothing: an engine that can sleep has no adapters."""
        return ""

    def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return Serving.of(self._client.ask("update", update_info(order, deadline), deadline))

    def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return self.apply(order.way_back(), deadline)

    def name(self, version: str, deadline: Deadline) -> None:
        name = self._client.adapter
        self._client.point(name, *standing_for(name, self._client.ask("status", {}, deadline)), deadline)

    def serving(self, deadline: Deadline) -> Serving:
        return Serving.of(self._client.ask("status", {}, deadline))

    def hold(self, reason: str, deadline: Deadline) -> None:
        """The name stands for nothing; versions that are there can be named, and the model and other adapters go on."""
        self._client.point(self._client.adapter, "", ids_of(self._client.ask("status", {}, deadline)), deadline)


def status_of(outcomes: list[WorkerOutcome]) -> Mapping[str, Any]:
    """What a client's ``status`` says of an engine whose workers said this."""
    dirty = bool(why_unfit(outcomes))
    first = outcomes[0]
    return {
        "weight_version": first.weight_version,
        "digest": first.digest or None,
        "dirty": dirty,
        "ready": not dirty,
    }
