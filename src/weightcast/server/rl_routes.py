"""vLLM's routes for reinforcement learning, in its dialect: existing trainers work against this server.

Stricter than vLLM where a client would be misled: wrong state is 409 and bad input 422 (never 500, which clients repeat),
and what cannot be done is refused instead of acknowledged. More tolerant where dialects differ: empty bodies, flags in the
query or in the body, numbers as versions, repeated /finish_weight_update and /resume.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.commit.shells import within
from weightcast.deadline import Deadline
from weightcast.engines.base import PauseMode
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.server.body import StructT, inside, query_flag, read_struct
from weightcast.server.context import ServerContext
from weightcast.server.control import pause_within
from weightcast.server.operation import Operation, QueryParam
from weightcast.server.replies import json_response
from weightcast.server.rl_schemas import (
    AbortBody,
    CheckerBody,
    EmptyBody,
    FinishBody,
    InitBody,
    PauseBody,
    ResetBody,
    StartBody,
    UpdateBody,
    VersionBody,
)

_FLAG = {"type": "boolean"}
_PAUSE_QUERY = (
    QueryParam(name="mode", schema={"type": "string", "enum": list(get_args(PauseMode))}),
    QueryParam(name="clear_cache", schema=_FLAG),
    QueryParam(name="timeout_s", schema={"type": "number", "exclusiveMinimum": 0}),
)
_RESET_QUERY = (
    QueryParam(name="reset_running_requests", schema=_FLAG),
    QueryParam(name="reset_external", schema=_FLAG, description="there is no external cache: nothing to reset"),
)
MAX_TIMEOUT_S = 24 * 3600.0


class RlRoutes:
    """The routes over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._finished: tuple[str | None] | None = None
        """The version given to the last finish that succeeded, until the next round starts."""
        self._background: set[asyncio.Task[Any]] = set()

    def operations(self) -> list[Operation]:
        def post(path: str, handler: Any, summary: str, body: type[msgspec.Struct], **more: Any) -> Operation:
            fields = {"guard": "token", "changes_weights": True, "body_optional": True, **more}
            return Operation(method="POST", path=path, handler=handler, summary=summary, tag="rl", body=body, **fields)

        required = {"body_optional": False}
        plain = {"changes_weights": False}
        return [
            post("/init_weight_transfer_engine", self.init, "Join a trainer", InitBody, **required),
            post("/start_weight_update", self.start, "Open a round", StartBody),
            post("/update_weights", self.update, "Receive (part of) the new weights", UpdateBody, **required),
            post("/finish_weight_update", self.finish, "End the round and name the version", FinishBody),
            post("/shutdown_weight_transfer_engine", self.shutdown, "Leave the trainer", EmptyBody),
            post("/update_weight_version", self.set_version, "Rename what is live", VersionBody, **required),
            post("/weight_checker", self.checker, "Digests of live parameters", CheckerBody, **required, **plain),
            post("/pause", self.pause, "Stop generation", PauseBody, query=_PAUSE_QUERY),
            post("/resume", self.resume, "Go on with generation", EmptyBody),
            post("/abort_requests", self.abort, "End some or all requests", AbortBody, **plain),
            post("/reset_prefix_cache", self.reset, "Forget cached keys and values", ResetBody, query=_RESET_QUERY, **plain),
        ]  # fmt: skip

    async def init(self, request: Request) -> Response:
        body = await self._read(request, InitBody, optional=False)
        with inside("init_info"):
            await self._weights("init", self._engine.init_weight_transfer_engine(body.init_info))
        return json_response({"message": "Weight transfer initialized"})

    async def start(self, request: Request) -> Response:
        body = await self._read(request, StartBody)
        if body.is_checkpoint_format is False:
            raise Unsupported("is_checkpoint_format=false is not supported", hint="Send weights under checkpoint names")
        await self._weights("start", self._engine.start_weight_update())
        self._finished = None
        return json_response({"message": "Weight update started"})

    async def update(self, request: Request) -> Response:
        body = await self._read(request, UpdateBody, optional=False)
        info = await self._for_this_engine(body.update_info)
        with inside("update_info"):
            await self._weights("update", self._engine.update_weights(info))
        return json_response({"message": "Weights updated"})

    async def finish(self, request: Request) -> Response:
        body = await self._read(request, FinishBody)
        version = None if body.weight_version is None else _version(body.weight_version, "weight_version")
        try:
            await self._weights("finish", self._engine.finish_weight_update(version))
        except StateError:
            # The answer to the first call may have been lost: the same call again is not an error.
            if self._finished != (version,):
                raise
        self._finished = (version,)
        return json_response({"message": "Weight update finished"})

    async def shutdown(self, request: Request) -> Response:
        await self._read(request, EmptyBody)
        await self._weights("shutdown", self._engine.shutdown_weight_transfer_engine())
        return json_response({"message": "Weight transfer shut down"})

    async def set_version(self, request: Request) -> Response:
        body = await self._read(request, VersionBody, optional=False)
        version = _version(body.new_version, "new_version")
        if body.abort_all_requests:
            await self._engine.abort(None)
        await self._engine.update_weight_version(version)
        return json_response({"success": True, "new_version": version})

    async def checker(self, request: Request) -> Response:
        body = await self._read(request, CheckerBody, optional=False)
        if body.action == "reset":
            raise Unsupported(
                "action=reset would leave weights of no version live",
                hint="Compare checksums from before and after a sync of different weights instead",
            )
        checksums = await self._engine.checksums()
        if body.action == "checksum":
            return json_response({"checksums": checksums})
        if body.baseline is None:
            raise InvalidInput("action=compare needs a baseline", field="baseline")
        names = sorted({*checksums, *body.baseline})
        mismatches = [name for name in names if checksums.get(name) != body.baseline.get(name)]
        return json_response({"match": not mismatches, "mismatches": mismatches})

    async def pause(self, request: Request) -> Response:
        body = await self._read(request, PauseBody)
        mode = request.query_params.get("mode", body.mode)
        if mode is None:
            mode = "wait" if body.wait_for_inflight_requests else "abort"
        if mode not in get_args(PauseMode):
            raise InvalidInput(f"mode must be abort, wait or keep, not {mode[:40]!r}", field="mode")
        clear_cache = query_flag(request, "clear_cache", body.clear_cache is not False)
        deadline = Deadline(_timeout_s(request, body.timeout_s, self._context.config.weight_call_timeout_s))
        await pause_within(self._engine, cast(PauseMode, mode), clear_cache, deadline)
        return json_response({"status": "paused"})

    async def resume(self, request: Request) -> Response:
        await self._read(request, EmptyBody)
        await self._engine.resume_generation()
        return json_response({"status": "resumed"})

    async def abort(self, request: Request) -> Response:
        body = await self._read(request, AbortBody)
        ids = None if body.request_ids is None else self._context.active.engine_ids(body.request_ids)
        num_aborted = await self._engine.abort(ids) if ids is None or ids else 0
        return json_response({"status": "aborted", "aborted": num_aborted})

    async def reset(self, request: Request) -> Response:
        body = await self._read(request, ResetBody)
        running = query_flag(request, "reset_running_requests", bool(body.reset_running_requests))
        query_flag(request, "reset_external", False)
        success = await self._engine.reset_prefix_cache(reset_running_requests=running)
        return json_response({"success": success})

    async def _read(self, request: Request, cls: type[StructT], *, optional: bool = True) -> StructT:
        return await read_struct(request, cls, self._context.config.max_body_nbytes, optional=optional)

    async def _weights(self, operation: str, call: Coroutine[Any, Any, None]) -> None:
        """Wait for a call on the engine; past the server's limit it goes on and its caller hears DeadlineExceeded."""
        deadline = Deadline(self._context.config.weight_call_timeout_s)
        with self._context.metrics.time_weight_operation(operation):
            await within(deadline, call, operation, self._background)

    async def _for_this_engine(self, info: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any]:
        if isinstance(info, dict):
            return info
        world_size = await self._engine.get_world_size(include_dp=True)
        if len(info) != world_size:
            raise InvalidInput(f"update_info has {len(info)} entries for {world_size} workers", field="update_info")
        if world_size != 1:
            raise Unsupported("update_info per worker needs an engine of one worker", hint="Send one object for all")
        return info[0]


def _version(value: str | int, field: str) -> str:
    text = str(value)
    if not text or len(text) > 256 or not text.isprintable():
        raise InvalidInput(f"{field} must be 1 to 256 printable characters", field=field)
    return text


def _timeout_s(request: Request, in_body: float | None, default_s: float) -> float:
    text = request.query_params.get("timeout_s")
    if text is None and in_body is None:
        return default_s
    try:
        timeout_s = float(text) if text is not None else float(in_body or 0)
    except ValueError:
        raise InvalidInput(f"timeout_s must be a number, not {str(text)[:40]!r}", field="timeout_s") from None
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidInput(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}", field="timeout_s")
    return timeout_s
