"""Connection: one authenticated TCP stream between the two processes of a pair.

Sockets never block: a wait is a poll of at most a tenth of a second, so that a deadline and an abort end every call. Nothing
that the peer sends can do more than end the connection with a named error.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, TransportError
from weightcast.transports.guard import EndGuard

STEP_S = 0.1
_MOST_SPANS = 512
"""Spans of memory in one system call; Linux takes 1,024."""


class Connection:
    """Sends and receives spans of memory. One thread sends and one receives at a time; ``hang_up`` may come from any thread."""

    def __init__(self, connection: socket.socket, guard: EndGuard) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._guard = guard

    def send(self, spans: Sequence[memoryview | bytes], deadline: Deadline, what: str) -> None:
        """Send all bytes of the spans, in order."""
        pending = deque(memoryview(span) for span in spans if len(span))
        # A TLS socket takes one buffer a call.
        step = self._send_one if isinstance(self.socket, ssl.SSLSocket) else self._send_several
        while pending:
            self._check(deadline, what)
            _advance(pending, self._attempt(lambda: step(pending), select.POLLOUT, deadline, what))

    def receive(self, spans: Sequence[memoryview], deadline: Deadline, what: str) -> None:
        """Fill the spans, in order."""
        pending = deque(span for span in spans if len(span))
        step = self._receive_one if isinstance(self.socket, ssl.SSLSocket) else self._receive_several
        while pending:
            self._check(deadline, what)
            nbytes = self._attempt(lambda: step(pending), select.POLLIN, deadline, what)
            if nbytes == 0:
                raise self._broken(what)
            _advance(pending, nbytes)

    def receive_bytes(self, nbytes: int, deadline: Deadline, what: str) -> bytes:
        """Return the next ``nbytes`` bytes."""
        data = bytearray(nbytes)
        self.receive([memoryview(data)], deadline, what)
        return bytes(data)

    def wait(self, event: int, deadline: Deadline, what: str) -> None:
        """Return when the socket is ready for ``event`` (a mask of ``select.poll``)."""
        poll = select.poll()
        poll.register(self.socket, event)
        while True:
            self._check(deadline, what)
            if poll.poll(1000 * min(STEP_S, deadline.remaining_s() + 0.001)):
                return

    def start_tls(self, context: ssl.SSLContext, deadline: Deadline, *, server: bool) -> None:
        """Encrypt the connection from here on. Both sides call this. TransportError when the other side is not the one that the context
        accepts."""
        what = "the TLS handshake"
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise self._broken(what, OSError(code, os.strerror(code)))
        try:
            secured = context.wrap_socket(
                self.socket, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=True
            )
        except (OSError, ValueError) as error:  # the other side hung up meanwhile
            raise self._broken(what, error) from None
        self.socket = secured

        def handshake() -> int:
            try:
                secured.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                raise TransportError(f"{what} failed: {error.reason or error}") from None
            return 0

        self._attempt(handshake, select.POLLIN, deadline, what)

    def hang_up(self) -> None:
        """End every call on this connection, on this side and on the peer's."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()

    def _check(self, deadline: Deadline, what: str) -> None:
        self._guard.check()
        deadline.check(what)

    def _attempt(self, step: Callable[[], int], event: int, deadline: Deadline, what: str) -> int:
        """The result of ``step``, repeated until the socket is ready for it."""
        while True:
            try:
                return step()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                if not isinstance(error, BlockingIOError):  # TLS may have to read before it can write
                    event = select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT
                self.wait(event, deadline, what)
            except (OSError, ValueError) as error:  # ValueError: TLS was ended
                raise self._broken(what, error) from None

    def _broken(self, what: str, error: Exception | None = None) -> TransportError:
        """Why the stream ended; an abort ends it, too."""
        if self._guard.aborted:
            return TransportError(f"{what} was aborted")
        return PeerLost(f"the other side is gone while {what}" + (f": {error}" if error else ""))

    def _send_several(self, pending: deque[memoryview]) -> int:
        return self.socket.sendmsg([pending[i] for i in range(min(len(pending), _MOST_SPANS))])

    def _receive_several(self, pending: deque[memoryview]) -> int:
        return self.socket.recvmsg_into([pending[i] for i in range(min(len(pending), _MOST_SPANS))])[0]

    def _send_one(self, pending: deque[memoryview]) -> int:
        return self.socket.send(pending[0])

    def _receive_one(self, pending: deque[memoryview]) -> int:
        return self.socket.recv_into(pending[0])


def _advance(pending: deque[memoryview], nbytes: int) -> None:
    """Forget the first ``nbytes`` bytes of the spans."""
    while nbytes:
        span = pending.popleft()
        if nbytes < len(span):
            pending.appendleft(span[nbytes:])
            return
        nbytes -= len(span)
