"""vLLM's own weight routes, answered with what became of the call: its workers never raise, so vLLM takes every call for done.

Each stands before the route of vLLM's that it answers for, and is as open as that. With another backend than weightcast's they are
not there, and vLLM's routes answer by themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Message, Receive, Scope, Send

INIT = "/init_weight_transfer_engine"
TOLD = (INIT, "/start_weight_update", "/update_weights")


class OwnRoute(Route):
    """A route that exists while ``is_ours`` returns True."""

    def __init__(self, route: Route, is_ours: Callable[[], bool]) -> None:
        super().__init__(route.path, route.endpoint, methods=list(route.methods or ()))
        self._is_ours = is_ours

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As of any route, or none."""
        return super().matches(scope) if self._is_ours() else (Match.NONE, {})


def told(
    theirs: BaseRoute,
    check: Callable[[], Awaitable[None]],
    before: Callable[[bytes], Awaitable[None]] | None = None,
) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that answers as ``theirs`` does. ``before`` gets the request's body and may raise first; ``check`` is called
    after ``theirs`` succeeded and may raise instead of the answer."""

    async def handler(request: Request) -> Response:
        sent: list[Message] = []
        receive = request.receive
        if before is not None:
            body = await request.body()
            await before(body)
            receive = _received(body)

        async def keep(message: Message) -> None:
            sent.append(message)

        _, found = theirs.matches(request.scope)
        request.scope.update(found)
        await theirs.handle(request.scope, receive, keep)
        answer = _Sent(sent)
        if 200 <= answer.status_code < 300:
            await check()
        return answer

    return handler


def _received(body: bytes) -> Receive:
    """The messages of a request whose body was read."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


class _Sent(Response):
    """An answer that was made already."""

    def __init__(self, messages: list[Message]) -> None:
        super().__init__(status_code=int(messages[0]["status"]) if messages else 500)
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        for message in self._messages:
            await send(message)
