"""Clients: how a Publisher calls engines. A client is imported when it is first used: HTTP alone needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightcast.lazy import lazy_names

if TYPE_CHECKING:
    from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
    from weightcast.trainer.clients.http import HttpEngineClient
    from weightcast.trainer.clients.in_loop import AsyncEngineClient
    from weightcast.trainer.clients.in_process import InProcessEngineClient, SyncEngine
    from weightcast.trainer.clients.making import make_client, make_clients, twins
    from weightcast.trainer.clients.ray import RayEngineClient
    from weightcast.trainer.clients.rpc import RpcEngineClient
    from weightcast.trainer.clients.sglang import SglangClient
    from weightcast.trainer.clients.vllm import AsyncVllmClient, VllmClient
    from weightcast.trainer.clients.vllm_dev import VllmDevClient


__all__ = [
    "AsyncEngineClient",
    "AsyncVllmClient",
    "CommitOrder",
    "CommitReply",
    "EngineClient",
    "HttpEngineClient",
    "InProcessEngineClient",
    "RayEngineClient",
    "RpcEngineClient",
    "SglangClient",
    "SyncEngine",
    "VllmClient",
    "VllmDevClient",
    "make_client",
    "make_clients",
    "twins",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AsyncEngineClient": "in_loop",
        "AsyncVllmClient": "vllm",
        "CommitOrder": "base",
        "CommitReply": "base",
        "EngineClient": "base",
        "HttpEngineClient": "http",
        "InProcessEngineClient": "in_process",
        "RayEngineClient": "ray",
        "RpcEngineClient": "rpc",
        "SglangClient": "sglang",
        "SyncEngine": "in_process",
        "VllmClient": "vllm",
        "VllmDevClient": "vllm_dev",
        "make_client": "making",
        "make_clients": "making",
        "twins": "making",
    },
    __all__,
)
