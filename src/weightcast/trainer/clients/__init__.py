"""Clients: how a Publisher calls engines."""

from __future__ import annotations

from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.clients.in_process import InProcessEngineClient, SyncEngine
from weightcast.trainer.clients.rpc import RpcEngineClient
from weightcast.trainer.clients.vllm import AsyncVllmClient, OfflineEngine, RayVllmClient, VllmClient


def make_client(engine: str | EngineClient | SyncEngine | OfflineEngine, *, token: str | None = None) -> EngineClient:
    """A client for a URL, an engine object or a client."""
    if isinstance(engine, EngineClient):
        return engine
    if isinstance(engine, str):
        return HttpEngineClient(engine, token=token)
    if isinstance(engine, OfflineEngine):
        return VllmClient(engine)
    return InProcessEngineClient(engine)


__all__ = [
    "AsyncVllmClient",
    "CommitOrder",
    "CommitReply",
    "EngineClient",
    "HttpEngineClient",
    "InProcessEngineClient",
    "RayVllmClient",
    "RpcEngineClient",
    "SyncEngine",
    "VllmClient",
    "make_client",
]
