"""weightcast's own control routes, for any server: they need an EngineControl and a guard, nothing else."""

from __future__ import annotations

import asyncio
import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import (
    Annotated,
    Any,
)

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.adapters import version_label
from weightcast.report.page import LIVE_PAGE, PAGE_HEADERS, render
from weightcast.server.auth import TokenAuth, guards_of, presented_token
from weightcast.server.body import inside, query_flag, read_struct
from weightcast.server.control import CommitPause, EngineControl, RoundOrder
from weightcast.server.history import RoundHistory
from weightcast.server.metrics import ServerMetrics
from weightcast.server.operation import Operation, QueryParam, routes_of
from weightcast.server.replies import json_response

MAX_TIMEOUT_S = 24 * 3600.0
MAX_BODY_NBYTES = 16 << 20


class InitBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weightcast/init."""

    init_info: dict[str, Any]


class DigestsBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weightcast/digests: the tensors of a checkpoint."""

    tensors: tuple[TensorSpec, ...]


class RollbackBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weightcast/rollback."""

    epoch: int
    round: int
    pause: CommitPause = "keep"
    clear_cache: bool = True
    timeout_s: float = 60.0
    adapter: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The LoRA adapter that the round is of; empty for the model."""


class WakeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /weightcast/wake. ``tags`` are vLLM's; none: all memory."""

    tags: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=64)], ...] = ()
    timeout_s: float = 60.0


class CommitBody(RollbackBody, kw_only=True, forbid_unknown_fields=True):
    """POST /weightcast/commit."""

    version: str


class ControlRoutes:
    """The routes over one EngineControl."""

    def __init__(
        self,
        control: EngineControl,
        auth: TokenAuth,
        *,
        metrics: ServerMetrics | None = None,
        max_body_nbytes: int = MAX_BODY_NBYTES,
    ) -> None:
        self._control = control
        self._auth = auth
        self._metrics = metrics
        self._max_body_nbytes = max_body_nbytes
        self._history = RoundHistory()

    def operations(self) -> list[Operation]:
        def change(path: str, handler: Any, summary: str, body: type[msgspec.Struct] | None) -> Operation:
            return Operation(
                method="POST",
                path=f"/weightcast/{path}",
                handler=handler,
                summary=summary,
                tag="weightcast",
                guard="token",
                changes_weights=True,
                body=body,
            )

        return [
            change("init", self.init, "Join a trainer's control channel", InitBody),
            change("commit", self.commit, "Bring a staged round live", CommitBody),
            change("rollback", self.rollback, "Return to the version before a round", RollbackBody),
            change("wake", self.wake, "Wake up memory that sleeps", WakeBody),
            change("shutdown", self.shutdown, "Leave the trainer", None),
            Operation(
                method="GET",
                path="/weightcast/status",
                handler=self.status,
                summary="What the engine serves; with the token also details",
                tag="weightcast",
                query=(QueryParam(name="checksums", schema={"type": "boolean"}, description="needs the token"),),
            ),
            Operation(
                method="POST",
                path="/weightcast/digests",
                handler=self.digests,
                summary="Digests of the live values of a checkpoint's tensors",
                tag="weightcast",
                guard="token",
                body=DigestsBody,
            ),
            Operation(
                method="GET",
                path="/weightcast/rounds",
                handler=self.rounds,
                summary="The latest rounds, as the page shows them",
                tag="weightcast",
            ),
            Operation(
                method="GET",
                path="/weightcast",
                handler=self.page,
                summary="A page that shows versions and rounds as they come",
                tag="weightcast",
                media_type="text/html",
            ),
        ]

    def metrics_operation(self) -> Operation:
        """The route of the metrics, for servers whose /metrics are not these; as open as those."""
        return Operation(
            method="GET",
            path="/weightcast/metrics",
            handler=self.metrics,
            summary="Prometheus metrics of weight sync",
            tag="weightcast",
            media_type="text/plain",
        )

    async def init(self, request: Request) -> Response:
        body = await read_struct(request, InitBody, self._max_body_nbytes)
        with self._timed("init"), inside("init_info"):
            await self._control.init(body.init_info)
        return json_response({"message": "Weight transfer initialized"})

    async def commit(self, request: Request) -> Response:
        body = await read_struct(request, CommitBody, self._max_body_nbytes)
        if not body.version:
            raise InvalidInput("version is empty", field="version")
        return await self._carry_out(_order(body, version=body.version))

    async def rollback(self, request: Request) -> Response:
        body = await read_struct(request, RollbackBody, self._max_body_nbytes)
        return await self._carry_out(_order(body, version=""))

    async def wake(self, request: Request) -> Response:
        body = await read_struct(request, WakeBody, self._max_body_nbytes)
        deadline = Deadline(_checked_timeout(body.timeout_s))
        with self._timed("wake"):
            try:
                async with asyncio.timeout(deadline.limit_s()):
                    asleep = await self._control.wake(body.tags)
            except TimeoutError:
                raise DeadlineExceeded(f"waking up took longer than {body.timeout_s:g} s") from None
        return json_response({"asleep": asleep})

    async def shutdown(self, request: Request) -> Response:
        await self._control.shutdown()
        return json_response({"message": "Weight transfer shut down"})

    async def status(self, request: Request) -> Response:
        """Everyone may read the status; details come with the token (or from this machine when there is none)."""
        with_checksums = query_flag(request, "checksums", False)
        answer = msgspec.to_builtins(await self._control.status())
        if with_checksums or presented_token(request) is not None:
            self._auth.check(request)
            answer["details"] = await self._control.details(with_checksums)
        return json_response(answer)

    async def metrics(self, request: Request) -> Response:
        assert self._metrics is not None
        try:
            status = await self._control.status()
        except EngineError:
            status = None
        return Response(self._metrics.render(status), headers={"content-type": self._metrics.content_type})

    async def digests(self, request: Request) -> Response:
        body = await read_struct(request, DigestsBody, self._max_body_nbytes)
        return json_response(await self._control.tensor_digests(Manifest.of(body.tensors)))

    async def rounds(self, request: Request) -> Response:
        """Open to everyone, as the status is; errors are named and not quoted."""
        status = await self._control.status()
        return json_response({"engines": [{"name": status.model, "status": status, "rounds": self._history.entries()}]})

    async def page(self, request: Request) -> Response:
        return Response(render(LIVE_PAGE), headers=PAGE_HEADERS, media_type="text/html")

    async def _carry_out(self, order: RoundOrder) -> Response:
        label = partial(version_label, order.adapter) if order.adapter else str
        history = self._history.record(order.action, order.epoch, order.round, order.version and label(order.version))
        with self._timed(order.action), history as outcome:
            answer = await self._control.carry_out(order)
            outcome.version, outcome.phases = label(answer.version), answer.phases
            if self._metrics is not None:
                self._metrics.observe_phases(order.action, answer.phases)
        return json_response(answer)

    def _timed(self, operation: str) -> AbstractContextManager[None]:
        return nullcontext() if self._metrics is None else self._metrics.time_weight_operation(operation)


def control_router(control: EngineControl, auth: TokenAuth, *, max_body_nbytes: int = MAX_BODY_NBYTES) -> Router:
    """The control routes alone, for another server: ``app.router.routes.extend(control_router(...).routes)``.

    Their metrics are at /weightcast/metrics: /metrics is that server's own.
    """
    routes = ControlRoutes(control, auth, metrics=ServerMetrics(), max_body_nbytes=max_body_nbytes)
    return Router(routes_of([*routes.operations(), routes.metrics_operation()], guards_of(auth)))


def _order(body: RollbackBody, *, version: str) -> RoundOrder:
    for name in ("epoch", "round"):
        if not 0 <= getattr(body, name) < 1 << 63:
            raise InvalidInput(f"{name} must be a number from 0 to 2^63 - 1", field=name)
    return RoundOrder(
        action="commit" if version else "rollback",
        epoch=body.epoch,
        round=body.round,
        version=version,
        pause=body.pause,
        clear_cache=body.clear_cache,
        timeout_s=_checked_timeout(body.timeout_s),
        adapter=body.adapter,
    )


def _checked_timeout(timeout_s: float) -> float:
    if not (math.isfinite(timeout_s) and 0 < timeout_s <= MAX_TIMEOUT_S):
        raise InvalidInput(f"timeout_s must be above 0 and at most {MAX_TIMEOUT_S:g}", field="timeout_s")
    return timeout_s
