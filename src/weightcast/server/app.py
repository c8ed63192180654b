"""create_app: the ASGI application over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.base import InferenceEngine
from weightcast.errors import WeightcastError
from weightcast.server.adapter_routes import AdapterRoutes
from weightcast.server.auth import TokenAuth, guards_of
from weightcast.server.chat_routes import ChatRoutes
from weightcast.server.completion_routes import CompletionRoutes
from weightcast.server.config import ServerConfig
from weightcast.server.context import ServerContext
from weightcast.server.control import EngineCommitter
from weightcast.server.control_routes import ControlRoutes
from weightcast.server.info_routes import InfoRoutes
from weightcast.server.metrics import MetricsMiddleware
from weightcast.server.openapi import describe
from weightcast.server.operation import Operation, routes_of
from weightcast.server.replies import RequestRefused, error_body, error_response, json_response
from weightcast.server.rl_routes import RlRoutes
from weightcast.server.sglang_routes import SglangRoutes
from weightcast.server.token_routes import TokenRoutes


def create_app(engine: InferenceEngine, config: ServerConfig | None = None) -> Starlette:
    """Serve ``engine``. Shutting the application down shuts the engine down."""
    context = ServerContext(engine=engine, config=config or ServerConfig())
    operations = _operations(context)
    api_key = context.config.api_key
    guards = guards_of(context.token_auth, None if api_key is None else TokenAuth(api_key, what="API key"))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await engine.shutdown()

    app = Starlette(
        routes=routes_of(operations, guards),
        middleware=[Middleware(MetricsMiddleware, metrics=context.metrics)],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
        lifespan=lifespan,
    )
    app.state.context = context
    # A path with a slash too many is no route: redirecting would answer, and quote the Host, before any guard.
    app.router.redirect_slashes = False
    return app


def _operations(context: ServerContext) -> list[Operation]:
    control = ControlRoutes(
        EngineCommitter(context.engine),
        context.token_auth,
        metrics=context.metrics,
        max_body_nbytes=context.config.max_body_nbytes,
    )
    answering = (CompletionRoutes(context), ChatRoutes(context), TokenRoutes(context), SglangRoutes(context))
    groups = (*answering, InfoRoutes(context), AdapterRoutes(context), RlRoutes(context), control)
    operations = [operation for group in groups for operation in group.operations()]

    async def openapi(request: Request) -> Response:
        return json_response(document)

    operations.append(
        Operation(method="GET", path="/openapi.json", handler=openapi, summary="This document", tag="info")
    )
    document: dict[str, Any] = describe(operations)
    return operations


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {404: "NotFound", 405: "MethodNotAllowed"}.get(error.status_code, "BadRequest")
    path = request.url.path[:200]
    refused = RequestRefused(error.status_code, f"{request.method} {path}: {error.detail}", kind=kind)
    response = error_response(refused)
    response.headers.update(error.headers or {})
    return response


async def _internal_error(request: Request, error: Exception) -> Response:
    """A fault of the server; the traceback goes to the log, the caller learns the kind."""
    return json_response(error_body(WeightcastError(f"internal error: {type(error).__name__}"), 500), 500)
