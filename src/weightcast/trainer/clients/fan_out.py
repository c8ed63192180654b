"""Many HTTP calls at once on the calling thread: each over a connection of its own, each with its own deadline (see wire).

Calls over TLS and over unix sockets are not made here: these have waits of another kind, which a thread of its own takes care of.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import h11
import httpcore

from weightcast.deadline import Deadline
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.urls import Endpoint

CHUNK_NBYTES = 2**16


class Call:
    """One call. ``result`` is what ``wire.request`` would return or raise, once it has ended."""

    def __init__(self, method: str, endpoint: Endpoint, path: str, content: bytes | None, deadline: Deadline) -> None:
        self.endpoint, self.deadline = endpoint, deadline
        self.result: httpcore.Response | Exception | None = None
        self._socket: socket.socket | None = None
        self._is_connected = False
        self._addresses: Iterator[wire.Found] = iter(())
        self._refusal: httpcore.ConnectError | None = None
        self._parts = httpcore.URL(endpoint.base + path)
        self._http = h11.Connection(h11.CLIENT)
        self._rest = memoryview(self._request(method, content or b""))
        self._head: h11.Response | None = None
        self._body = bytearray()

    def response(self) -> httpcore.Response:
        """The response, or what was raised in its place."""
        if isinstance(self.result, httpcore.Response):
            return self.result
        raise self.result or httpcore.ReadTimeout("the call was not made")

    @staticmethod
    def can_make(endpoint: Endpoint) -> bool:
        """Whether a call of this endpoint can be one of many."""
        return endpoint.socket_path is None and not endpoint.base.startswith("https:")

    @property
    def where(self) -> tuple[str, int]:
        """The host and its port."""
        return self._parts.host.decode().strip("[]"), self._parts.port or 80

    def _request(self, method: str, content: bytes) -> bytes:
        host = self._parts.host + (b":%d" % self._parts.port if self._parts.port else b"")
        headers = [("Host", host.decode()), ("Content-Type", "application/json"), *self.endpoint.headers.items()]
        if content:
            headers.append(("Content-Length", str(len(content))))
        start = self._http.send(h11.Request(method=method, target=self._parts.target, headers=headers))
        body = self._http.send(h11.Data(content)) if content else b""
        return (start or b"") + (body or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    # -- steps: each returns the socket to wait for and what for, or None once there is a result

    def start(self, addresses: Iterable[wire.Found]) -> None:
        """Connect to the first of the addresses that takes a connection."""
        self._addresses = iter(addresses)
        self._connect()

    def _connect(self) -> None:
        for family, address in self._addresses:
            try:
                self._socket = wire.connecting(family, address)
                return
            except httpcore.ConnectError as error:
                self._refusal = error
        self.end(self._refusal or wire.no_address(self.endpoint.host))

    def waits_for(self) -> tuple[socket.socket, int] | None:
        """The socket, and whether it is waited for to be read or to be written; None where there is a result, or nothing is open."""
        if self.result is not None or self._socket is None:
            return None
        return self._socket, selectors.EVENT_WRITE if self._rest else selectors.EVENT_READ

    def step(self) -> None:
        """The socket is ready: connect, write or read what can be."""
        assert self._socket is not None
        try:
            if not self._is_connected:
                self._finish_connecting(self._socket)
            elif self._rest:
                self._rest = self._rest[self._socket.send(self._rest) :]
            else:
                self._read(self._socket.recv(CHUNK_NBYTES))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end((httpcore.WriteError if self._rest else httpcore.ReadError)(str(error)))
        except h11.RemoteProtocolError as error:
            self.end(httpcore.RemoteProtocolError(str(error)))

    def _finish_connecting(self, connection: socket.socket) -> None:
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            self._is_connected = True
            return
        connection.close()
        self._socket, self._refusal = None, wire.refusal_of(OSError(code, os.strerror(code)))
        self._connect()

    def _read(self, data: bytes) -> None:
        if not data and self._http.their_state is h11.SEND_RESPONSE:
            raise h11.RemoteProtocolError("Server disconnected without sending a response.")
        self._http.receive_data(data)
        while self.result is None:
            match self._http.next_event():
                case h11.Response() as head:
                    self._head = head
                case h11.Data() as some:
                    self._body += some.data
                    if len(self._body) > wire.ANSWER_NBYTES:
                        self.end(wire.too_long())
                case h11.EndOfMessage():
                    assert self._head is not None
                    headers = list(self._head.headers)
                    self.end(wire.read_response(self._head.status_code, headers, bytes(self._body)))
                case h11.InformationalResponse():
                    continue
                case _:
                    return

    def look(self) -> None:
        """End the call where its deadline has passed."""
        if self.result is None and self.deadline.passed:
            writing = httpcore.WriteTimeout if self._rest else httpcore.ReadTimeout
            late = writing if self._is_connected else httpcore.ConnectTimeout
            self.end(late("the deadline has passed"))

    def end(self, result: httpcore.Response | Exception) -> None:
        """Idempotent: the first result counts."""
        if self.result is None:
            self.result = result
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def make_calls(calls: Sequence[Call]) -> Iterator[Call]:
    """Make all calls side by side; each is yielded when it has a result."""
    with _Names() as names, selectors.DefaultSelector() as selector:
        selector.register(names.wake, selectors.EVENT_READ)
        pending = set(calls)
        try:
            yield from _make(pending, names, selector)
        finally:
            for call in pending:
                call.end(httpcore.ReadTimeout("the call was given up"))


def _make(pending: set[Call], names: _Names, selector: selectors.BaseSelector) -> Iterator[Call]:
    registered: dict[Call, tuple[socket.socket, int]] = {}
    touched: list[Call] = []
    for call in pending:
        names.ask(call, *call.where)
    looked_at = time.monotonic()
    while pending:
        touched += names.start_those_found()
        if time.monotonic() >= looked_at + wire.STEP_S:
            looked_at = time.monotonic()
            for call in pending:
                call.look()
            touched += [call for call in pending if call.result is not None]
        for call in dict.fromkeys(touched):
            _register(selector, registered, call)
            if call.result is not None and call in pending:
                pending.discard(call)
                yield call
        touched = []
        for key, _ in selector.select(wire.STEP_S if pending else 0):
            if isinstance(key.data, Call):
                key.data.step()
                touched.append(key.data)


def _register(selector: selectors.BaseSelector, registered: dict[Call, tuple[socket.socket, int]], call: Call) -> None:
    """Have the selector wait for what the call waits for now."""
    before, now = registered.get(call), call.waits_for()
    if before == now:
        return
    if before is not None:
        selector.unregister(before[0])
        del registered[call]
    if now is not None:
        selector.register(*now, call)
        registered[call] = now


class _Names:
    """Looks up hosts: a thread for each name that is none of an address, while the look-up lasts. ``wake`` can be read when one is found."""

    def __init__(self) -> None:
        self.wake, self._bell = socket.socketpair()
        self.wake.setblocking(False)
        self._bell.setblocking(False)
        self._found: queue.SimpleQueue[tuple[tuple[str, int], list[wire.Found] | httpcore.ConnectError]] = (
            queue.SimpleQueue()
        )
        self._calls: dict[tuple[str, int], list[Call]] = {}

    def __enter__(self) -> _Names:
        return self

    def __exit__(self, *_: object) -> None:
        self.wake.close()
        self._bell.close()

    def ask(self, call: Call, host: str, port: int) -> None:
        """Start the call once its host is found."""
        waiting = self._calls.setdefault((host, port), [])
        waiting.append(call)
        if len(waiting) > 1:
            return
        if wire.is_literal(host):
            self._look_up(host, port)
        else:
            threading.Thread(target=self._look_up, args=(host, port), name="weightcast-resolve", daemon=True).start()

    def _look_up(self, host: str, port: int) -> None:
        self._found.put(((host, port), wire.look_up(host, port)))
        # Full: the bell has rung already. Closed: nobody waits any more.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def start_those_found(self) -> list[Call]:
        """Start the calls whose hosts were found."""
        started: list[Call] = []
        while True:
            try:
                where, found = self._found.get_nowait()
            except queue.Empty:
                return started
            with contextlib.suppress(BlockingIOError):
                self.wake.recv(CHUNK_NBYTES)
            for call in self._calls.pop(where):
                if isinstance(found, httpcore.ConnectError):
                    call.end(found)
                else:
                    call.start(found)
                started.append(call)
