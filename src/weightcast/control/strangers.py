"""Strangers: connections of peers that the trainer has not admitted. Each is closed when its time is up."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any

import zmq

ADMISSION_S = 20.0
"""A worker that was asked to join says hello at once, and a refused one leaves."""
EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


class Strangers:
    """The connections of a socket that nobody has vouched for, by descriptor. For the I/O thread.

    ZeroMQ offers no call that closes one peer's connection, so the connection is shut down below ZeroMQ. A descriptor may have become
    another socket's since it was noted: only one that still leads to the same peer is touched.
    """

    def __init__(self, admission_s: float = ADMISSION_S) -> None:
        self._admission_s = admission_s
        self._waiting: dict[int, tuple[float, Any]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def note(self, event: int, descriptor: int) -> None:
        """Take in what ZeroMQ's monitor tells of a connection."""
        self._waiting.pop(descriptor, None)
        if event == zmq.EVENT_ACCEPTED:
            with _connection(descriptor) as connection:
                self._waiting[descriptor] = time.monotonic() + self._admission_s, _peer(connection)

    def admit(self, descriptor: int) -> None:
        """The peer of that connection is a member: the connection stays. All events so far have to be noted."""
        self._waiting.pop(descriptor, None)

    def close_late(self) -> int:
        """Shut down the connections whose time is up, and return how many these were."""
        now = time.monotonic()
        late = [descriptor for descriptor, (until, _) in self._waiting.items() if until <= now]
        for descriptor in late:
            _, peer = self._waiting.pop(descriptor)
            with _connection(descriptor) as connection:
                if connection is not None and peer is not None and _peer(connection) == peer:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
        return len(late)


@contextlib.contextmanager
def _connection(descriptor: int) -> Any:
    """The socket behind a descriptor of ZeroMQ's, or None where it is none any more. ZeroMQ's own descriptor stays open."""
    try:
        connection = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        yield None
        return
    with connection:
        yield connection


def _peer(connection: socket.socket | None) -> Any:
    """Both addresses of a connection; None for one that has ended."""
    try:
        return None if connection is None else (connection.getsockname(), connection.getpeername())
    except OSError:
        return None
