"""Connections: how many a server keeps, how long each may take, and what the log says of those that were ended.

uvicorn waits for the head of a request, for its body and for a reader of the answer without end, and a process without descriptors
accepts nobody. Here all waits end, and room is kept: when all places are taken, a connection that waits for a request gives way to
the newcomer, requests beyond their share are refused with 503 before anything is done, and ``/health`` is always answered.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from weightcast.server.replies import RequestRefused, error_response
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
SWEEP_S = 0.5
ACCEPTED_AT_ONCE = 32
"""How many connections asyncio accepts before anybody looks at them; as many descriptors are kept for them."""
LISTEN_BACKLOG = 1024
SPARE_DESCRIPTORS = 64
"""Kept for weight transfers, files and logs."""
FEWEST = 16
ALWAYS_ANSWERED = ("/health", "/ready")
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 21\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\ntoo many connections\n"
)
_ACCEPT_FAILED = "socket.accept() out of system resource"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many connections there may be, and how long each may take."""

    connections: int = MAX_CONNECTIONS
    head_s: float = 10.0
    """From the first byte of a request, or from the beginning of a connection, to the end of the request's head."""
    body_s: float = 30.0
    """For the body, beside the time that it takes at ``body_nbytes_s``."""
    body_nbytes_s: float = 64 * 1024
    unread_s: float = 60.0
    """How long a client may leave what was sent to it unread."""

    @property
    def requests(self) -> int:
        """How many requests may be in work at a time: some connections are kept for /health."""
        return self.connections - max(4, self.connections // 16)


def affordable(connections: int) -> int:
    """At most ``connections``, and no more than this process can have descriptors for; raises its soft limit for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd")) + ACCEPTED_AT_ONCE + SPARE_DESCRIPTORS
    wanted = connections + taken
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(FEWEST, min(connections, soft - taken))


class Connections:
    """The open connections of one server, oldest first. For the thread of the event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: dict[BoundedProtocol, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._seldom = Seldom(logger)

    def opened(self, connection: BoundedProtocol) -> None:
        """Take a connection in; where there is no place the oldest one that waits for a request goes, or else the newcomer."""
        if len(self._open) >= self.limits.connections:
            waiting = next((other for other in self._open if not other.in_request), None)
            self._seldom.warn(f"all {self.limits.connections} connections are taken")
            if waiting is None:
                connection.refuse(_FULL)
                return
            self._end(waiting)
        self._open[connection] = None
        if self._sweep is None:
            self._later()

    def closed(self, connection: BoundedProtocol) -> None:
        self._open.pop(connection, None)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For ``set_exception_handler``: asyncio reports each connection that could not be accepted, with a traceback."""
        if context.get("message") == _ACCEPT_FAILED:
            self._seldom.warn(f"connections cannot be accepted: {context.get('exception')}")
        else:
            loop.default_exception_handler(context)

    def _later(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._end_overdue)

    def _end_overdue(self) -> None:
        self._sweep = None
        now = time.monotonic()
        for connection in [each for each in self._open if each.is_overdue(now)]:
            self._seldom.warn("a connection took too long to send a request, or to read the answer")
            self._end(connection)
        if self._open:
            self._later()

    def _end(self, connection: BoundedProtocol) -> None:
        self._open.pop(connection, None)
        connection.transport.abort()


class BoundedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol of one connection, which keeps book of when it last got on."""

    def __init__(self, *arguments: Any, book: Connections, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._book = book
        self._head_since: float | None = time.monotonic()
        self._body_since = 0.0
        self._body_nbytes = 0
        self._unread_since: float | None = None
        self._seen: object = None

    @property
    def in_request(self) -> bool:
        """Whether a request's head is here and its answer not yet complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_overdue(self, now: float) -> bool:
        limits = self._book.limits
        if self._unread_since is not None and now - self._unread_since > limits.unread_s:
            return True
        if not self.in_request:
            return self._head_since is not None and now - self._head_since > limits.head_s
        allowed_s = limits.body_s + self._body_nbytes / limits.body_nbytes_s
        return self.cycle.more_body and not self.flow.read_paused and now - self._body_since > allowed_s

    def refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._book.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._book.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.in_request and self._head_since is None:
            self._head_since = time.monotonic()
        self._body_nbytes += len(data)
        super().data_received(data)
        if self.cycle is not self._seen:
            self._seen, self._head_since = self.cycle, None
            self._body_since, self._body_nbytes = time.monotonic(), 0

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()


@dataclass(slots=True)
class RequestRoom:
    """ASGI middleware: requests beyond ``limit`` are refused before anything is done; /health and /ready are answered always."""

    app: ASGIApp
    limit: int
    _in_work: int = field(default=0, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self.app(scope, receive, send)
            return
        if self._in_work >= self.limit:
            refusal = RequestRefused(503, f"{self.limit} requests are in work", kind="TooManyRequests")
            answer = error_response(refusal)
            answer.headers["connection"] = "close"
            await answer(scope, receive, send)
            return
        self._in_work += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_work -= 1
