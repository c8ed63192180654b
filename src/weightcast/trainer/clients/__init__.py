"""Clients: how a Publisher calls engines."""

from __future__ import annotations

from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.clients.in_process import InProcessEngineClient, SyncEngine


def make_client(engine: str | EngineClient | SyncEngine, *, token: str | None = None) -> EngineClient:
    """A client for a URL, an engine object or a client."""
    if isinstance(engine, EngineClient):
        return engine
    if isinstance(engine, str):
        return HttpEngineClient(engine, token=token)
    return InProcessEngineClient(engine)


__all__ = [
    "CommitOrder",
    "CommitReply",
    "EngineClient",
    "HttpEngineClient",
    "InProcessEngineClient",
    "SyncEngine",
    "make_client",
]
