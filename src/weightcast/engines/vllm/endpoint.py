"""The endpoint plug-in: ``/weightcast/*`` in vLLM's own server, without its development mode.

vLLM loads it only where VLLM_PLUGINS names it; ``plugin.register`` sees to that when the command line asks for the backend. The
token is WEIGHTCAST_TOKEN; without one the routes that change anything answer clients of this machine only.

In development mode vLLM's own weight routes are answered here: the workers never raise, so vLLM takes every call for done, and its
/finish_weight_update names the version that the trainer asks for without knowing what became of the update.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.commit.worker_outcome import NO_VERSION
from weightcast.engines.vllm.front import VllmControl
from weightcast.engines.vllm.stock_routes import INIT, TOLD, OwnRoute, told
from weightcast.server.auth import TokenAuth, guards_of
from weightcast.server.body import query_flag, read_struct
from weightcast.server.control_routes import MAX_BODY_NBYTES, control_router
from weightcast.server.info_routes import readiness
from weightcast.server.operation import Operation, routes_of
from weightcast.server.replies import json_response
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import usable_token
from weightcast.vllm_protocol.eras import BACKEND, has_backend

TOKEN_VARIABLE = "WEIGHTCAST_TOKEN"
FINISH = "/finish_weight_update"
INFO = "/weight_info"


class FinishBody(msgspec.Struct, kw_only=True):
    """POST /finish_weight_update, as vLLM takes it."""

    weight_version: str | None = None


class _InitBody(msgspec.Struct):
    """POST /init_weight_transfer_engine, as vLLM takes it."""

    init_info: dict[str, Any]


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
        before = routes_of(self._before_stock(app.router.routes), guards)
        app.router.routes[:0] = [OwnRoute(route, self._is_ours) for route in before]

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is not None:
            self._control.attach(engine_client)
            models = getattr(state, "openai_serving_models", None)
            if models is not None and getattr(engine_client.vllm_config, "lora_config", None) is not None:
                names = [path.name for path in models.base_model_paths]
                self._control.front.engine.adapter_names().show(models.lora_requests, names)

    def _before_stock(self, routes: list[Any]) -> list[Operation]:
        """What answers in place of vLLM's weight routes, those that it serves."""
        stock = {path: route for route in routes if (path := getattr(route, "path", None)) in (*TOLD, FINISH, INFO)}
        own = [self._told_operation(path, stock[path]) for path in TOLD if path in stock]
        if INFO in stock:
            own.append(self._info_operation(stock[INFO]))
        return [*own, self._finish_operation()] if FINISH in stock else own

    def _is_ours(self) -> bool:
        return self._control.is_attached and has_backend(self._control.front.engine.config)

    def _told_operation(self, path: str, theirs: Any) -> Operation:
        return Operation(
            method="POST",
            path=path,
            handler=told(theirs, self._check, self._greet) if path == INIT else told(theirs, self._check_and_close),
            summary="As vLLM's; an error when a worker could not carry the call out",
            tag=BACKEND,
            changes_weights=True,
        )

    async def _greet(self, body: bytes) -> None:
        """Wait for the trainer here and not in the workers, which join in vLLM's one call. What cannot be read is vLLM's to refuse."""
        with contextlib.suppress(msgspec.MsgspecError):
            init_info = msgspec.json.decode(body, type=known(_InitBody)).init_info
            await self._control.front.greet(init_info)

    def _info_operation(self, theirs: Any) -> Operation:
        """vLLM's label says nothing of weights that were lost in a sleep."""

        async def handler(request: Request) -> Response:
            if await self._control.front.is_empty():
                return json_response({"weight_version": NO_VERSION})
            return await told(theirs, _nothing)(request)

        return Operation(
            method="GET",
            path=INFO,
            handler=handler,
            summary="As vLLM's; no version where weights were lost in a sleep",
            tag=BACKEND,
        )

    async def _check(self) -> None:
        await self._control.front.raise_outcome(closes=False)

    async def _check_and_close(self) -> None:
        await self._control.front.raise_outcome(closes=True)

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
                path=INFO,
                handler=self._weight_info,
                summary="Which version is live",
                tag=BACKEND,
            ),
            Operation(
                method="GET",
                path="/ready",
                handler=self._ready,
                summary="200 when requests are served",
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

    async def _ready(self, request: Request) -> Response:
        status = await self._control.status()
        return readiness(status, status.model)

    async def _weight_info(self, request: Request) -> Response:
        return json_response({"weight_version": await self._control.front.get_weight_version()})


async def _nothing() -> None:
    """What is left to check of an answer that only tells."""
