"""The ways in which a trainer reaches an engine, over scripted engines: what one commit suite is run over.

A ``Way`` has a client and the engine behind it. The engine is looked at and made to fail beside the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette

from tests.support.dev_server import DevServer
from tests.support.scripted_vllm import Failure, ScriptedLLM, ScriptedVllm
from weightcast.engines.vllm.front import VllmControl
from weightcast.errors import LoadError, StateError
from weightcast.server import ServerConfig, TokenAuth, control_router, create_app
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.trainer.clients import (
    AsyncEngineClient,
    AsyncVllmClient,
    EngineClient,
    HttpEngineClient,
    InProcessEngineClient,
    RayEngineClient,
    VllmClient,
    VllmDevClient,
)

Failing = Literal["apply", "dirty", "forget"]
Slow = Literal["pause", "apply", "resume"]


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 30.0) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Way(ABC):
    """An engine, and a client that reaches it."""

    client: EngineClient
    pauses = True
    """The engine can be paused; an offline one has no step in between and only refuses requests."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What the engine's weights are, asked of the engine itself."""

    @property
    @abstractmethod
    def paused(self) -> bool: ...

    @property
    @abstractmethod
    def computes(self) -> bool:
        """Whether a request would be computed now."""

    @property
    @abstractmethod
    def num_updates(self) -> int:
        """How many updates the engine was told to carry out."""

    @abstractmethod
    def pause(self) -> None:
        """Pause as the engine's owner."""

    @abstractmethod
    def modes(self) -> list[str]:
        """The modes of all pauses so far."""

    @abstractmethod
    def forgot(self) -> bool:
        """Whether keys and values of running requests were dropped."""

    @abstractmethod
    def fail(self, what: Failing) -> None:
        """Have it fail once: the update, the update half-way, or the cleaning of caches."""

    @abstractmethod
    def take_time(self, what: Slow, seconds: float) -> None: ...


class EmbeddedWay(Way):
    """Ways to a ScriptedEngine."""

    def __init__(self, loop: Loop, engine: ScriptedEngine, client: EngineClient) -> None:
        self._loop, self.engine, self.client = loop, engine, client
        loop.run(engine.init_weight_transfer_engine({"address": "tcp://127.0.0.1:1"}))

    @property
    def version(self) -> str:
        return self.engine.version

    @property
    def paused(self) -> bool:
        return bool(self._loop.run(self.engine.is_paused()))

    @property
    def computes(self) -> bool:
        return bool(self._loop.run(self.engine.status()).ready) and not self.paused

    @property
    def num_updates(self) -> int:
        return len(self.engine.named("update_weights"))

    def pause(self) -> None:
        self._loop.run(self.engine.pause_generation("keep", False))
        self.engine.calls.clear()

    def modes(self) -> list[str]:
        return [call["mode"] for call in self.engine.named("pause_generation")]

    def forgot(self) -> bool:
        cleared = any(call["clear_cache"] for call in self.engine.named("pause_generation"))
        return cleared or True in self.engine.named("reset_prefix_cache")

    def fail(self, what: Failing) -> None:
        if what == "forget":
            self.engine.fail("pause_generation", RuntimeError("in use"))
        else:
            self.engine.fail("update_weights", LoadError("scripted"), dirty=what == "dirty")

    def take_time(self, what: Slow, seconds: float) -> None:
        names = {"pause": "pause_generation", "apply": "update_weights", "resume": "resume_generation"}
        self.engine.seconds[names[what]] = seconds


class VllmWay(Way):
    """Ways to a ScriptedVllm of one worker."""

    def __init__(self, loop: Loop, engine: ScriptedVllm, client: EngineClient) -> None:
        self._loop, self.engine, self.client = loop, engine, client

    @property
    def version(self) -> str:
        (version,) = set(self.engine.versions)
        return version

    @property
    def paused(self) -> bool:
        return self.engine.paused

    @property
    def computes(self) -> bool:
        return not self.engine.paused

    @property
    def num_updates(self) -> int:
        return sum(call in ("commit", "rollback") for call in self.engine.calls)

    def pause(self) -> None:
        self._loop.run(self.engine.pause_generation(mode="keep", clear_cache=False))
        self.engine.calls.clear()

    def modes(self) -> list[str]:
        return [call.split()[1] for call in self.engine.calls if call.startswith("pause")]

    def forgot(self) -> bool:
        return any(call.endswith("clear=True") or call == "forget running=True" for call in self.engine.calls)

    def fail(self, what: Failing) -> None:
        if what == "forget":
            self.engine.keeps_cache = True
        else:
            self.engine.workers[0].fails["commit"] = Failure(dirty=what == "dirty")

    def take_time(self, what: Slow, seconds: float) -> None:
        self.engine.seconds["commit" if what == "apply" else what] = seconds


class OfflineWay(Way):
    """A vLLM ``LLM``: nothing is computed while it is called."""

    pauses = False

    def __init__(self) -> None:
        self.engine = ScriptedLLM()
        self.client = VllmClient(self.engine)
        self._resets = 0
        reset = self.engine.reset_prefix_cache

        def count() -> bool:
            self._resets += 1
            return reset()

        self.engine.reset_prefix_cache = count  # type: ignore[method-assign]

    @property
    def version(self) -> str:
        return self.engine.workers[0].version

    @property
    def paused(self) -> bool:
        return not self.computes

    @property
    def computes(self) -> bool:
        try:
            self.engine.generate("a")
        except StateError:
            return False
        return True

    @property
    def num_updates(self) -> int:
        return self.engine.workers[0].num_updates

    def pause(self) -> None:
        raise NotImplementedError("an offline engine is not paused by its owner")

    def modes(self) -> list[str]:
        return []

    def forgot(self) -> bool:
        return self._resets > 0

    def fail(self, what: Failing) -> None:
        if what == "forget":
            self.engine.keeps_cache = True
        else:
            self.engine.workers[0].fails["commit"] = Failure(dirty=what == "dirty")

    def take_time(self, what: Slow, seconds: float) -> None:
        call = ScriptedLLM.collective_rpc

        def slowly(method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
            if args[1].get("action") == "commit":
                time.sleep(seconds)
            return call(self.engine, method, timeout, args)

        self.engine.collective_rpc = slowly  # type: ignore[method-assign]


class Synchronous:
    """A ScriptedEngine as a synchronous engine object, whose calls wait."""

    def __init__(self, engine: ScriptedEngine, loop: Loop) -> None:
        self._engine, self._loop = engine, loop

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._engine, name)
        return lambda *arguments, **named: self._loop.run(method(*arguments, **named))


class Actor:
    """A Ray actor of this process: it does one thing at a time."""

    def __init__(self, llm: Any) -> None:
        served = SimpleNamespace(llm=llm)
        self._turns = ThreadPoolExecutor(1)
        self.__ray_call__ = SimpleNamespace(
            remote=lambda function, *arguments: self._turns.submit(function, served, *arguments)
        )

    def close(self) -> None:
        self._turns.shutdown()


class GetTimeoutError(Exception):
    """Stands for ray.exceptions.GetTimeoutError."""


class RayActorError(Exception):
    """Stands for ray.exceptions.RayActorError."""


def get(answer: Any, timeout: float) -> Any:
    """As ray.get."""
    try:
        return answer.result(timeout)
    except TimeoutError:
        if answer.done():
            raise
        raise GetTimeoutError from None


def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
    """As ray.wait."""
    done, waiting = futures.wait(answers, timeout)
    return list(done), list(waiting)


RAY = SimpleNamespace(
    get=get, wait=wait, exceptions=SimpleNamespace(GetTimeoutError=GetTimeoutError, RayActorError=RayActorError)
)
"""Stands for the module ``ray``."""


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of a server of this process, on a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def http(loop: Loop) -> Iterator[Way]:
    """``weightcast serve``."""
    engine = ScriptedEngine()
    with serving(create_app(engine, ServerConfig())) as url:
        yield EmbeddedWay(loop, engine, HttpEngineClient(url))


@contextlib.contextmanager
def in_loop(loop: Loop) -> Iterator[Way]:
    """An ``AsyncLLM`` object."""
    engine = ScriptedEngine()
    yield EmbeddedWay(loop, engine, AsyncEngineClient(engine, loop.loop))


@contextlib.contextmanager
def in_process(loop: Loop) -> Iterator[Way]:
    """An ``LLM`` object."""
    engine = ScriptedEngine()
    client = InProcessEngineClient(Synchronous(engine, loop))
    yield EmbeddedWay(loop, engine, client)
    client.close()


@contextlib.contextmanager
def ray(loop: Loop) -> Iterator[Way]:
    """An ``LLM`` in an actor; the module ``ray`` has to be RAY."""
    engine = ScriptedEngine()
    actor = Actor(Synchronous(engine, loop))
    yield EmbeddedWay(loop, engine, RayEngineClient(actor))
    actor.close()


@contextlib.contextmanager
def vllm_server(loop: Loop) -> Iterator[Way]:
    """weightcast's routes in a vLLM server."""
    engine, control = ScriptedVllm(), VllmControl()
    control.attach(engine)
    app = Starlette(routes=control_router(control, TokenAuth(None)).routes)
    with serving(app) as url:
        yield VllmWay(loop, engine, HttpEngineClient(url))


@contextlib.contextmanager
def vllm_in_loop(loop: Loop) -> Iterator[Way]:
    """A vLLM ``AsyncLLM`` object."""
    engine = ScriptedVllm()
    yield VllmWay(loop, engine, AsyncVllmClient(engine, loop.loop))


@contextlib.contextmanager
def vllm_dev(loop: Loop) -> Iterator[Way]:
    """vLLM's development routes."""
    server = DevServer(ScriptedVllm())
    client = VllmDevClient(server.url)
    yield VllmWay(loop, server.engine, client)
    client.close()
    server.close()


@contextlib.contextmanager
def vllm_offline(loop: Loop) -> Iterator[Way]:
    """A vLLM ``LLM`` object."""
    way = OfflineWay()
    yield way
    way.client.close()


WAYS = (http, in_loop, in_process, ray, vllm_server, vllm_in_loop, vllm_dev, vllm_offline)
