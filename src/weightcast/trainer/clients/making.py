"""Making clients: an EngineClient for each engine that a user gives, and the search for clients of one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightcast.errors import InvalidInput
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.trainer.clients.base import EngineClient
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.clients.in_loop import AsyncEngineClient
from weightcast.trainer.clients.in_process import InProcessEngineClient, SyncEngine
from weightcast.trainer.clients.sglang import SglangClient, is_sglang
from weightcast.trainer.clients.vllm import AsyncVllmClient, OfflineEngine, VllmClient


def make_client(
    engine: str | EngineClient | SyncEngine | OfflineEngine, *, token: str | None = None, adapter: str | None = None
) -> EngineClient:
    """Make a client for a URL or an engine object; return a client as it is. Call this on the running event loop of an asynchronous
    engine. ``adapter``: what the client's calls are about, where that is not the model."""
    client = _client(engine, token)
    if adapter is not None:
        client.for_adapter(adapter)
    return client


def _client(engine: Any, token: str | None) -> EngineClient:
    if isinstance(engine, EngineClient):
        return engine
    if isinstance(engine, str):
        return HttpEngineClient(engine, token=token)
    if type(engine).__module__.partition(".")[0] == "ray":
        raise InvalidInput("a Ray actor needs a client of its own", field="engines", hint="Give RayEngineClient(actor)")
    if is_sglang(engine):
        return SglangClient(engine)
    if asyncio.iscoroutinefunction(getattr(engine, "update_weights", None)):
        return _client_on_loop(engine)
    if isinstance(engine, OfflineEngine):
        return VllmClient(engine)
    if not callable(getattr(engine, "get_world_size", None)):
        raise InvalidInput(
            f"{quoted(repr(engine), NAME_CHARACTERS)} is no engine, but of type {type(engine).__name__}",
            field="engines",
            hint="An engine is the URL of a server, an LLM, AsyncLLM or sglang.Engine object, or an EngineClient",
        )
    return InProcessEngineClient(engine)


def check_engines(engines: object) -> None:
    """Raise InvalidInput unless a user gave a list of engines."""
    # A text is a sequence, too: of letters.
    if isinstance(engines, str):
        raise InvalidInput("engines is a list, not one URL", field="engines", hint="Give [url]")
    if engines is None or isinstance(engines, Mapping):
        what = "None" if engines is None else "a mapping"
        hint = "Leave engines out where there are none yet, and call add()" if engines is None else "Give [url, ...]"
        raise InvalidInput(f"engines is a list, not {what}", field="engines", hint=hint)
    if not isinstance(engines, Iterable):
        raise InvalidInput(
            f"engines is a list, not one {type(engines).__name__}", field="engines", hint="Give [engine]"
        )


def make_clients(engines: Iterable[Any], *, token: str | None = None, adapter: str | None = None) -> list[EngineClient]:
    """Make a client for each of a user's engines. InvalidInput when two of them are one engine."""
    clients = [make_client(engine, token=token, adapter=adapter) for engine in engines]
    if same := twins(clients):
        for client in clients:
            client.close()
        raise InvalidInput(f"an engine is listed twice: {same[0]!r} and {same[1]!r} are one engine", field="engines")
    return clients


def twins(clients: Sequence[EngineClient]) -> tuple[str, str] | None:
    """Return the names of two clients that have the same name or the same engine object; None when there are none."""
    for number, client in enumerate(clients):
        for other in clients[:number]:
            same = client.target is not None and (client.target is other.target or client.target == other.target)
            if same or client.name == other.name:
                return other.name, client.name
    return None


def _client_on_loop(engine: Any) -> EngineClient:
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise InvalidInput(
            f"a {type(engine).__name__} belongs to an event loop, and none runs here",
            field="engines",
            hint="Make the Publisher in a coroutine, and then: await asyncio.to_thread(publisher.publish)",
        ) from None
    is_vllm = asyncio.iscoroutinefunction(getattr(engine, "collective_rpc", None))
    return AsyncVllmClient(engine, loop) if is_vllm else AsyncEngineClient(engine, loop)
