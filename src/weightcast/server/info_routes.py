"""Routes that only read: models, health, metrics, versions, the description of the server, and refusals by name."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.base import EngineStatus, HoldsAdapters
from weightcast.errors import EngineError, InvalidInput, Unsupported
from weightcast.manifest.adapters import version_label
from weightcast.server.body import query_flag
from weightcast.server.context import ServerContext
from weightcast.server.operation import Operation, QueryParam
from weightcast.server.replies import json_response

_REFUSED = {
    "/start_draft_weight_update": "there is no draft model",
    "/collective_rpc": "calling worker methods over HTTP is not supported; use the weight routes",
    "/sleep": "this engine does not give up its memory; stop the server instead",
    "/wake_up": "this engine never sleeps",
}


def publish_hint(status: EngineStatus) -> str | None:
    """What makes an engine serve that is alive and does not serve: new weights."""
    return "Publish to it: Publisher(...).publish(), or weightcast push" if status.alive else None


def readiness(status: EngineStatus, model: str) -> Response:
    """The answer of /ready: 503 with the reason until requests are served."""
    if not status.ready:
        raise EngineError(f"not serving: {status.reason}", engine=model, hint=publish_hint(status))
    return json_response({"status": "ready", "weight_version": status.weight_version})


class InfoRoutes:
    """The routes over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._engine = context.engine

    def operations(self) -> list[Operation]:
        def get(path: str, handler: Any, summary: str, tag: str, **more: Any) -> Operation:
            return Operation(method="GET", path=path, handler=handler, summary=summary, tag=tag, **more)

        include_dp = (QueryParam(name="include_dp", schema={"type": "boolean"}),)
        config_format = (QueryParam(name="config_format", schema={"type": "string", "enum": ["json", "text"]}),)
        reads = [
            get("/v1/models", self.models, "The served model", "openai", guard="api_key"),
            get("/health", self.health, "200 while weights can be received", "info"),
            get("/ping", self.health, "The same as /health", "info"),
            Operation(method="POST", path="/ping", handler=self.health, summary="The same as /health", tag="info"),
            get("/version", self.version, "The version of weightcast", "info"),
            get("/load", self.load, "How many requests are in work", "info"),
            get("/ready", self.ready, "200 when requests are served", "info"),
            get("/metrics", self.metrics, "Prometheus metrics", "info", media_type="text/plain"),
            get("/server_info", self.server_info, "How the engine is configured", "rl", query=config_format),
            get("/is_paused", self.is_paused, "Whether generation is paused", "rl"),
            get("/get_world_size", self.world_size, "Number of workers", "rl", query=include_dp),
            get("/weight_info", self.weight_info, "The live version", "rl"),
        ]
        return reads + [
            Operation(
                method="POST", path=path, handler=_refusal(path, reason), summary=f"Refused: {reason}", tag="refused",
                guard="token",
            )
            for path, reason in _REFUSED.items()
        ]  # fmt: skip

    async def models(self, request: Request) -> Response:
        model = {
            "id": self._context.model_name,
            "object": "model",
            "created": self._context.created,
            "owned_by": "weightcast",
            "root": self._engine.model_name,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }
        served = (await self._engine.status()).adapters if isinstance(self._engine, HoldsAdapters) else {}
        adapters = [
            {**model, "id": name, "root": version_label(name, status.weight_version), "parent": model["id"]}
            for name, status in served.items()
            if status.ready
        ]
        return json_response({"object": "list", "data": [model, *adapters]})

    async def health(self, request: Request) -> Response:
        """Alive is not ready: trainers wait for this before they send the weights that an engine waits for."""
        status = await self._engine.status()
        if not status.alive:
            raise EngineError(f"not alive: {status.reason}", engine=self._context.model_name)
        return json_response({"status": "ok", "weight_version": status.weight_version, "ready": status.ready})

    async def version(self, request: Request) -> Response:
        return json_response({"version": version("weightcast")})

    async def load(self, request: Request) -> Response:
        return json_response({"server_load": len(self._context.active)})

    async def ready(self, request: Request) -> Response:
        return readiness(await self._engine.status(), self._context.model_name)

    async def metrics(self, request: Request) -> Response:
        try:
            status = await self._engine.status()
        except EngineError:
            status = None
        metrics = self._context.metrics
        return Response(metrics.render(status), headers={"content-type": metrics.content_type})

    async def is_paused(self, request: Request) -> Response:
        return json_response({"is_paused": await self._engine.is_paused()})

    async def world_size(self, request: Request) -> Response:
        include_dp = query_flag(request, "include_dp", True)
        return json_response({"world_size": await self._engine.get_world_size(include_dp=include_dp)})

    async def weight_info(self, request: Request) -> Response:
        status = await self._engine.status()
        adapters = {"adapters": status.adapters} if status.adapters else {}
        return json_response({"weight_version": status.weight_version, "digest": status.digest, **adapters})

    async def server_info(self, request: Request) -> Response:
        """What clients look for before a sync: the transfer backend, the dtype, and how logprobs are computed."""
        config_format = request.query_params.get("config_format", "json")
        if config_format not in ("json", "text"):
            raise InvalidInput(f"config_format must be json or text, not {config_format[:40]!r}", field="config_format")
        status = await self._engine.status()
        config: dict[str, Any] = {
            "model_config": {
                "model": self._engine.model_name,
                "served_model_name": self._context.model_name,
                "dtype": self._context.config.dtype,
                "max_model_len": self._engine.max_model_len,
                "logprobs_mode": "processed_logprobs",
            },
            "weight_transfer_config": {"backend": status.backend, **self._context.config.weight_transfer_config},
            "parallel_config": {
                "world_size": await self._engine.get_world_size(include_dp=False),
                "world_size_across_dp": status.world_size,
            },
            "lora_config": None,
        }
        text = msgspec.json.encode(config).decode()
        return json_response({"vllm_config": config if config_format == "json" else text})


def _refusal(path: str, reason: str) -> Any:
    async def refuse(request: Request) -> Response:
        raise Unsupported(f"{path}: {reason}", hint="Do without this route")

    return refuse
