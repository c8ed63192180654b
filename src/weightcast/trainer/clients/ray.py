"""RayEngineClient: an engine object that lives in a Ray actor. The actor's class takes ``PublishedTo`` as a base.

The actor carries out an EngineClient's calls on its own engine, one after the other with the actor's other calls. Errors come back as
records, because Ray would wrap an exception and hide its class.
"""

from __future__ import annotations

import itertools
from collections.abc import (
    Mapping,
    Sequence,
)
from typing import Any

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, ErrorForm, InvalidInput, PeerLost
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.untrusted.known import known

STEP_S = 0.2
_numbers = itertools.count()


class RayEngineClient(EngineClient):
    """Calls an actor whose class is a ``PublishedTo``. A call waits, within its deadline, for the calls that the actor got before."""

    kind = "ray"

    def __init__(self, actor: Any, *, host: str = "127.0.0.1") -> None:
        if getattr(actor, "weightcast_call", None) is None:
            raise InvalidInput(
                f"{type(actor).__name__} is no Ray actor that a Publisher can call",
                field="engines",
                hint="Give the actor's class the base weightcast.trainer.clients.PublishedTo, and set its self.llm",
            )
        self._actor = self.target = actor
        self.host = host
        self.name = f"ray-{next(_numbers)}"

    def world_size(self, deadline: Deadline) -> int:
        return int(self._call("world_size", deadline))

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._call("init", deadline, dict(init_info))

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        reply: CommitReply = self._call("commit", deadline, order)
        return reply

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._call("rollback", deadline, epoch, round)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status: Mapping[str, Any] = self._call("status", deadline)
        return status

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        return tuple(self._call("wake", deadline, tuple(tags)))

    def shutdown(self, deadline: Deadline) -> None:
        self._call("shutdown", deadline)

    def _call(self, method: str, deadline: Deadline, *arguments: Any) -> Any:
        import ray

        call = self._actor.weightcast_call.remote(method, arguments, deadline.limit_s())
        try:
            # In steps: a deadline may be cancelled meanwhile.
            while not ray.wait([call], timeout=min(STEP_S, deadline.limit_s()))[0] and not deadline.passed:
                continue
            answer = ray.get(call, timeout=0)
        except ray.exceptions.GetTimeoutError:
            raise DeadlineExceeded(
                f"{method} took longer than {deadline.timeout_s:g} s",
                engine=self.name,
                hint="An actor does one thing at a time: is it still generating, or loading its model?",
            ) from None
        except ray.exceptions.RayActorError as error:
            raise PeerLost(f"{method}: the actor is gone: {error}", engine=self.name) from error
        if "error" in answer:
            raise msgspec.convert(answer["error"], known(ErrorForm)).error(engine=self.name)
        return answer["value"]
