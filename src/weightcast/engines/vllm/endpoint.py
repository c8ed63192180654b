"""The endpoint plug-in: ``/weightcast/*`` in vLLM's own server, without its development mode.

vLLM loads it only where VLLM_PLUGINS names it; ``plugin.register`` sees to that when the command line asks for the backend. The
token is WEIGHTCAST_TOKEN; without one the routes that change anything answer clients of this machine only.

In development mode one route of vLLM's is answered here instead: its own /finish_weight_update names the version that the trainer
asks for without knowing what became of the update, because the workers never raise.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.vllm.front import VllmControl
from weightcast.secret import usable_token
from weightcast.server.auth import TokenAuth, guards_of
from weightcast.server.body import query_flag, read_struct
from weightcast.server.control_routes import MAX_BODY_NBYTES, control_router
from weightcast.server.operation import Operation, routes_of
from weightcast.server.replies import json_response
from weightcast.vllm_eras import BACKEND

TOKEN_VARIABLE = "WEIGHTCAST_TOKEN"
FINISH = "/finish_weight_update"


class FinishBody(msgspec.Struct, kw_only=True):
    """POST /finish_weight_update, as vLLM takes it."""

    weight_version: str | None = None


class WeightcastEndpoints:
    """What vLLM calls: ``attach_router`` while the application is built, ``init_state`` when the engine is up."""

    name = BACKEND
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._control = VllmControl()

    def attach_router(self, app: Any) -> None:
        """Add the control routes, and the two open ones that trainers ask before them where vLLM does not serve them."""
        auth = TokenAuth(usable_token(os.environ.get(TOKEN_VARIABLE) or None, field=TOKEN_VARIABLE))
        guards = guards_of(auth)
        present = {getattr(route, "path", None) for route in app.router.routes}
        app.router.routes.extend(control_router(self._control, auth).routes)
        missing = [operation for operation in self._open_operations() if operation.path not in present]
        app.router.routes.extend(routes_of(missing, guards))
        if FINISH in present:
            app.router.routes[:0] = routes_of([self._finish_operation()], guards)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is not None:
            self._control.attach(engine_client)

    def _open_operations(self) -> list[Operation]:
        return [
            Operation(
                method="GET",
                path="/get_world_size",
                handler=self._world_size,
                summary="How many workers the engine has",
                tag=BACKEND,
            ),
            Operation(
                method="GET",
                path="/weight_info",
                handler=self._weight_info,
                summary="Which version is live",
                tag=BACKEND,
            ),
        ]

    def _finish_operation(self) -> Operation:
        """As open as the route that it stands before."""
        return Operation(
            method="POST",
            path=FINISH,
            handler=self._finish,
            summary="End an update; it gets its version only if every worker carried it out",
            tag=BACKEND,
            changes_weights=True,
            body=FinishBody,
            body_optional=True,
        )

    async def _finish(self, request: Request) -> Response:
        body = await read_struct(request, FinishBody, MAX_BODY_NBYTES, optional=True)
        await self._control.front.close_update(body.weight_version)
        return json_response({"message": "Weight update finished"})

    async def _world_size(self, request: Request) -> Response:
        size = await self._control.front.get_world_size(query_flag(request, "include_dp", True))
        return json_response({"world_size": size})

    async def _weight_info(self, request: Request) -> Response:
        return json_response({"weight_version": await self._control.front.get_weight_version()})
