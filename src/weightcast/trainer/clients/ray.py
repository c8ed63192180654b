"""RayEngineClient: an engine object that lives in a Ray actor, whatever the actor's class.

Ray runs a function with the actor's object, one after the other with the actor's other calls. The function carries out an EngineClient's
call on the actor's engine. In an asynchronous actor a thread carries out the call beside the actor's event loop, and the client asks for
the answer. Errors come back as records, because Ray would wrap an exception and hide its class.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import attrgetter
from typing import Any

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, ErrorForm, InvalidInput, PeerLost, Unsupported
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.making import make_client
from weightcast.untrusted.known import known

STEP_S = 0.2
ASK_AGAIN_S = 0.005
LOOP_S = 30.0
CALLS = "_weightcast_calls"
"""Where an actor's object keeps its ActorCalls."""
_numbers = itertools.count()


class RayEngineClient(EngineClient):
    """Calls the engine that an actor keeps in an attribute. A call waits, within its deadline, for the calls that the actor got before.

    weightcast has to be installed where the actor runs; the actor's class needs nothing.

    Args:
        actor: the actor's handle.
        attribute: where the actor's object has its engine; dots lead into objects of objects.
        host: the host of the actor's node, as this process names it.
    """

    kind = "ray"

    def __init__(self, actor: Any, *, attribute: str = "llm", host: str = "127.0.0.1") -> None:
        if getattr(actor, "__ray_call__", None) is None:
            raise InvalidInput(
                f"a {type(actor).__name__} is no handle of a Ray actor",
                field="engines",
                hint="Give what ray.remote(Engine).remote(...) or ray.get_actor(name) returned",
            )
        self._actor = self.target = actor
        self._attribute = attribute
        self.host = host
        self.name = f"ray-{next(_numbers)}"

    def wait_until_there(self, deadline: Deadline) -> None:
        self._call("world_size", deadline)

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
        remote = self._actor.__ray_call__.remote
        answer = self._result(
            method, remote(carry_out, self._attribute, method, arguments, deadline.limit_s()), deadline
        )
        while "number" in answer:
            time.sleep(min(ASK_AGAIN_S, deadline.limit_s()))
            answer = self._result(method, remote(ask_again, answer["number"]), deadline)
            if deadline.passed and "number" in answer:
                raise self._late(method, deadline)
        if "error" in answer:
            raise msgspec.convert(answer["error"], known(ErrorForm)).error(engine=self.name)
        return answer["value"]

    def _result(self, method: str, call: Any, deadline: Deadline) -> dict[str, Any]:
        import ray

        try:
            # In steps: a deadline may be cancelled meanwhile.
            while not ray.wait([call], timeout=min(STEP_S, deadline.limit_s()))[0] and not deadline.passed:
                continue
            answer: dict[str, Any] = ray.get(call, timeout=0)
        except ray.exceptions.GetTimeoutError:
            raise self._late(method, deadline) from None
        except ray.exceptions.RayActorError as error:
            raise PeerLost(f"{method}: the actor is gone: {error}", engine=self.name) from error
        return answer

    def _late(self, method: str, deadline: Deadline) -> DeadlineExceeded:
        return deadline.exceeded(
            method,
            engine=self.name,
            hint="An actor does one thing at a time: is it still generating, or loading its model?",
        )


def actors_named(pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Any]]:
    """The actors of this Ray namespace whose whole names match, in order of their names, with the matches."""
    import ray

    matches = [match for name in sorted(ray.util.list_named_actors()) if (match := pattern.fullmatch(name))]
    return [(match, ray.get_actor(match[0])) for match in matches]


def answers_of(calls: Sequence[Any], deadline: Deadline) -> list[Any]:
    """What actors answered to calls that were made of them."""
    import ray

    try:
        answers: list[Any] = ray.get(list(calls), timeout=deadline.limit_s())
    except ray.exceptions.GetTimeoutError:
        raise deadline.exceeded("the call to actors") from None
    return answers


class ActorCalls:
    """An actor's client of its engine, and the calls that go on beside the event loop of an asynchronous actor."""

    def __init__(self, engine: object) -> None:
        self.engine, self._loop = engine, _loop_of_actor()
        self._client = self._made(engine)
        self._numbers = itertools.count()
        self._answers: dict[int, Future[dict[str, Any]]] = {}

    def run(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
        """The answer; in an asynchronous actor, which must not wait, the number under which to ask for the answer."""
        work = partial(self._answer, method, arguments, timeout_s)
        if self._loop is None:
            return work()
        number, answer = next(self._numbers), Future[dict[str, Any]]()
        self._answers[number] = answer
        threading.Thread(target=lambda: answer.set_result(work()), name=f"weightcast-{method}", daemon=True).start()
        return {"number": number}

    def ask(self, number: int) -> dict[str, Any]:
        """The answer of a call that went on, or its number once more."""
        return self._answers.pop(number).result() if self._answers[number].done() else {"number": number}

    def _answer(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
        try:
            return {"value": getattr(self._client, method)(*arguments, Deadline(timeout_s))}
        except Exception as error:  # noqa: BLE001 - Ray would wrap an exception
            return _told(error)

    def _made(self, engine: Any) -> EngineClient:
        """The client; one of an asynchronous engine is made on the event loop that the engine runs on."""

        async def made() -> EngineClient:
            return make_client(engine)

        if self._loop is None:
            return make_client(engine)
        return asyncio.run_coroutine_threadsafe(made(), self._loop).result(LOOP_S)


def carry_out(
    actor: object, attribute: str, method: str, arguments: tuple[Any, ...], timeout_s: float
) -> dict[str, Any]:
    """In the actor's process: carry out, or begin, a call of EngineClient on the actor's engine."""
    try:
        engine = _engine_of(actor, attribute)
        calls: ActorCalls | None = getattr(actor, CALLS, None)
        if calls is None or calls.engine is not engine:
            calls = ActorCalls(engine)
            setattr(actor, CALLS, calls)
    except Exception as error:  # noqa: BLE001 - Ray would wrap an exception
        return _told(error)
    return calls.run(method, arguments, timeout_s)


def ask_again(actor: object, number: int) -> dict[str, Any]:
    """In the actor's process: the answer of a call that began, or its number once more."""
    calls: ActorCalls = getattr(actor, CALLS)
    return calls.ask(number)


def _told(error: Exception) -> dict[str, Any]:
    return {"error": msgspec.to_builtins(ErrorForm.of(error, otherwise=EngineError))}


def _loop_of_actor() -> asyncio.AbstractEventLoop | None:
    """The event loop of an asynchronous actor, from Ray's own worker; None in an actor that waits."""
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    core = getattr(worker, "core_worker", None)
    if core is None or not core.current_actor_is_asyncio():
        return None
    try:
        from ray._raylet import PythonFunctionDescriptor  # type: ignore[attr-defined]

        loop: asyncio.AbstractEventLoop = core.get_event_loop(PythonFunctionDescriptor(__name__, "call", ""), "")[0]
    except Exception as error:
        raise Unsupported(
            f"this Ray does not tell the event loop of an asynchronous actor ({error})",
            hint="Use Ray 2.60, or serve the engine over HTTP and give its URL",
        ) from error
    return loop


def _engine_of(actor: object, attribute: str) -> Any:
    try:
        engine = attrgetter(attribute)(actor)
    except AttributeError:
        engine = None
    if engine is None:
        raise InvalidInput(
            f"{type(actor).__name__} has no engine in its attribute {attribute!r}",
            field="attribute",
            hint="Give RayEngineClient(actor, attribute=...) the name under which the actor has its LLM",
        )
    return engine
