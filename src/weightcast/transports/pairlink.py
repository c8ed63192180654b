"""A quiet TCP connection beside the data of a GPU pair: who meets whom, and at once the news that a process is gone."""

from __future__ import annotations

import contextlib
import select
import socket

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, TransportError
from weightcast.transports.guard import EndGuard
from weightcast.transports.rendezvous import Listener, PairStore, dial


class PairLink:
    """One side of the connection; open from ``accept_from`` or ``dial_to`` until ``close``."""

    def __init__(self, peer: str, store: PairStore, stack: contextlib.ExitStack) -> None:
        self._peer = peer
        self._store = store
        self._stack = stack

    @classmethod
    def accept_from(cls, listener: Listener, deadline: Deadline) -> PairLink:
        """The trainer's side: wait for the worker that knows the listener's secret."""
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(listener.accept(deadline))
            return cls("worker", store, stack.pop_all())

    @classmethod
    def dial_to(cls, address: str, port: int, secret: bytes, deadline: Deadline, guard: EndGuard) -> PairLink:
        """The worker's side."""
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(dial(address, port, secret, deadline, guard))
            return cls("trainer", store, stack.pop_all())

    def meet(self, name: str) -> None:
        """Return when the other side has reached the meeting of that name, too, within the deadline of connecting."""
        mine, theirs = ("w", "t") if self._peer == "trainer" else ("t", "w")
        self._store.set(f"{name}/{mine}", b"")
        self._store.get(f"{name}/{theirs}")

    def check(self) -> None:
        """Raise PeerLost when the other process closed its end or died. Any thread."""
        try:
            poll = select.poll()  # one object cannot be polled by two threads
            poll.register(self._store.connection, select.POLLIN | select.POLLRDHUP)
            if not poll.poll(0):
                return
            gone = not self._store.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except (OSError, ValueError):  # ValueError: closed by another thread
            gone = True
        if gone:
            raise PeerLost(f"the {self._peer} is gone")
        raise TransportError(f"the {self._peer} sent something unexpected")

    def close(self) -> None:
        self._stack.close()
