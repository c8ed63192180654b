"""``/weightcast/*`` in SGLang's own server, guarded by weightcast's token, beside SGLang's API key.

The token is WEIGHTCAST_TOKEN; without one the routes that change anything answer clients of this machine only.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.sglang.served import SglangEngine
from weightcast.engines.stock.front import StockControl, StockFront
from weightcast.server.auth import TokenAuth, guards_of
from weightcast.server.body import query_flag
from weightcast.server.control_routes import control_router
from weightcast.server.info_routes import readiness
from weightcast.server.operation import Operation, routes_of
from weightcast.server.replies import json_response
from weightcast.untrusted.secret import usable_token

TOKEN_VARIABLE = "WEIGHTCAST_TOKEN"
PREFIX = "/weightcast"
SIZE, INFO, READY = "/get_world_size", "/weight_info", "/ready"


def is_own_path(path: str) -> bool:
    """Whether a route of weightcast's answers there."""
    return path == PREFIX or path.startswith(PREFIX + "/") or path in (SIZE, INFO, READY)


def serve_routes(app: Any, engine: SglangEngine) -> None:
    """Add the control routes, and the two open ones that trainers ask before them, to a server's application."""
    auth = TokenAuth(usable_token(os.environ.get(TOKEN_VARIABLE) or None, field=TOKEN_VARIABLE))
    control: StockControl[StockFront[SglangEngine]] = StockControl(StockFront)
    control.attach(engine)
    app.router.routes.extend(control_router(control, auth).routes)
    app.router.routes.extend(routes_of(_open_operations(control.front), guards_of(auth)))
    # SGLang's route of this path knows nothing of weights.
    app.router.routes[:0] = routes_of([_ready_operation(control.front)], guards_of(auth))


def _open_operations(front: StockFront[SglangEngine]) -> list[Operation]:
    def asked(path: str, handler: Callable[[Request], Awaitable[Response]], summary: str) -> Operation:
        return Operation(method="GET", path=path, handler=handler, summary=summary, tag="weightcast")

    async def world_size(request: Request) -> Response:
        front.engine.require_backend()
        size = await front.get_world_size(query_flag(request, "include_dp", True))
        return json_response({"world_size": size})

    async def weight_info(request: Request) -> Response:
        return json_response({"weight_version": await front.get_weight_version()})

    return [
        asked(SIZE, world_size, "How many workers the engine has"),
        asked(INFO, weight_info, "Which version is live"),
    ]


def _ready_operation(front: StockFront[SglangEngine]) -> Operation:
    async def ready(request: Request) -> Response:
        if not front.engine.is_ready():
            return Response(status_code=503)
        status = await front.status()
        return readiness(status, status.model)

    return Operation(
        method="GET", path=READY, handler=ready, summary="200 when requests are served", tag="weightcast"
    )  # fmt: skip
