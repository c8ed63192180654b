"""A quiet TCP connection beside the data of a GPU pair: who meets whom, and at once the news that a process is gone."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Sequence

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost
from weightcast.transports.guard import EndGuard
from weightcast.transports.rendezvous import Listener, PairStore, dial


class PairLink:
    """One side of the connection; open from ``accept_from`` or ``dial_to`` until ``close``."""

    def __init__(self, peer: str, store: PairStore, stack: contextlib.ExitStack) -> None:
        self._peer = peer
        self._store = store
        self._stack = stack
        self._num_calls = 0

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
            poll.register(self._store.connection, select.POLLRDHUP)
            gone = bool(poll.poll(0))
        except (OSError, ValueError):  # closed by another thread
            gone = True
        if gone:
            raise PeerLost(f"the {self._peer} is gone")

    def call(self) -> None:
        """Tell the other side that this one goes on; ``num_calls`` tells it how often."""
        try:
            self._store.connection.send(b"\x01")
        except OSError as error:
            raise PeerLost(f"the {self._peer} is gone: {error}") from None

    def num_calls(self) -> int:
        """How often the other side has called since the connection began. One thread at a time."""
        with contextlib.suppress(OSError):
            while calls := self._store.connection.recv(4096, socket.MSG_DONTWAIT):
                self._num_calls += len(calls)
        return self._num_calls

    @staticmethod
    def wait_any(links: Sequence[PairLink], timeout_s: float) -> None:
        """Return when something has come, or broken, on one of these connections, or after the timeout."""
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed by another thread
            for link in links:
                poll.register(link._store.connection, select.POLLIN | select.POLLRDHUP)
            poll.poll(1000 * max(timeout_s, 0.0))

    def close(self) -> None:
        self._stack.close()
