"""Operation: one method on one path. Routes, guards, metrics and /openapi.json all come from the same table."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from weightcast.errors import ErrorForm, WeightcastError
from weightcast.server.auth import Check, Guard
from weightcast.server.replies import CLIENT_GONE, error_response
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

SCOPE_ROUTE = "weightcast.route"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryParam:
    """A query parameter as /openapi.json shows it."""

    name: str
    schema: dict[str, Any]
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of the server.

    ``changes_weights``: no error may answer 5xx, because a client that posts again would repeat the change.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    summary: str
    tag: str
    guard: Guard = "open"
    changes_weights: bool = False
    body: type[msgspec.Struct] | None = None
    body_optional: bool = False
    query: tuple[QueryParam, ...] = ()
    media_type: str = "application/json"


def routes_of(operations: Sequence[Operation], guards: Mapping[Guard, Check]) -> list[Route]:
    """Starlette routes; errors become answers inside each route, so they work in any application."""
    return [Route(operation.path, _endpoint(operation, guards), methods=[operation.method]) for operation in operations]


def _endpoint(operation: Operation, guards: Mapping[Guard, Check]) -> Handler:
    check, refused = guards.get(operation.guard), Seldom(logger)

    async def endpoint(request: Request) -> Response:
        request.scope[SCOPE_ROUTE] = operation.path
        try:
            if check is not None:
                check(request)
            return await operation.handler(request)
        except WeightcastError as error:
            return _refuse(operation, error, refused)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            if not operation.changes_weights:
                raise
            # A fault of ours inside a weight call must not look like "try again": clients repeat a 500.
            logger.exception("%s %s failed", operation.method, operation.path)
            fault = ErrorForm.of(error).error()
            fault.message = f"internal error: {fault.message}"
            return error_response(fault, changes_weights=True, guarded=operation.guard != "open")

    return endpoint


def _refuse(operation: Operation, error: WeightcastError, refused: Seldom) -> Response:
    """Answer with the error and log it; what anybody can cause is logged once a minute for each route and status."""
    guarded = operation.guard != "open"
    response = error_response(error, changes_weights=operation.changes_weights, guarded=guarded)
    status, what = response.status_code, f"{operation.method} {operation.path}: {response.status_code}"
    if operation.path in ("/health", "/ready"):
        logger.debug("%s %s", what, error)  # asked every second by whoever waits
    elif status == 401 or operation.guard != "token":
        refused.warn(what, about=str(error))
    else:
        logger.log(logging.WARNING if status >= 424 else logging.INFO, "%s %s", what, error)
    return response
