"""A quiet TCP connection beside the data of a GPU pair: who meets whom, and at once the news that a process is gone."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator, Sequence

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, ProtocolError, StateError
from weightcast.transports.connection import Connection
from weightcast.transports.guard import EndGuard
from weightcast.transports.rendezvous import Listener, dial

_MET = b"\x02"


class PairLink:
    """One side of the connection; open from ``accept_from`` or ``dial_to`` until ``close``."""

    def __init__(self, peer: str, connection: Connection) -> None:
        self._peer = peer
        self._connection = connection
        self._num_calls = 0

    @classmethod
    def accept_from(cls, listener: Listener, deadline: Deadline) -> PairLink:
        """The trainer's side: wait for the worker that knows the listener's secret."""
        (connection,) = listener.accept(deadline)
        return cls("worker", connection)

    @classmethod
    def dial_to(cls, address: str, port: int, secret: bytes, deadline: Deadline, guard: EndGuard) -> PairLink:
        """The worker's side: dial the trainer and prove to each other who the two are."""
        return cls("trainer", dial(address, port, secret, deadline, guard))

    def meet(self, deadline: Deadline) -> None:
        """Return when the other side has come here as well. Call this once, before any ``call``."""
        what = f"meeting the {self._peer}"
        self._connection.send([_MET], deadline, what)
        if self._connection.receive_bytes(1, deadline, what) != _MET:
            raise ProtocolError(f"the {self._peer} says something else than that it is there")

    def check(self) -> None:
        """Raise PeerLost when the other process closed its end or died. Any thread."""
        try:
            poll = select.poll()  # one object cannot be polled by two threads
            poll.register(self._connection.socket, select.POLLRDHUP)
            gone = bool(poll.poll(0))
        except (OSError, ValueError):  # closed by another thread
            gone = True
        if gone:
            raise PeerLost(f"the {self._peer} is gone")

    def call(self) -> None:
        """Tell the other side that this side goes on. The other side counts these calls by ``num_calls``."""
        try:
            self._connection.socket.send(b"\x01")
        except OSError as error:
            raise PeerLost(f"the {self._peer} is gone: {error}") from None

    def num_calls(self) -> int:
        """Return how often the other side has called since the connection began. Only one thread may ask at a time."""
        with contextlib.suppress(OSError):
            while calls := self._connection.socket.recv(4096, socket.MSG_DONTWAIT):
                self._num_calls += len(calls)
        return self._num_calls

    @staticmethod
    def wait_any(links: Sequence[PairLink], timeout_s: float) -> None:
        """Return when one of these connections has received something or has broken, or when the timeout is over."""
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed by another thread
            for link in links:
                poll.register(link._connection.socket, select.POLLIN | select.POLLRDHUP)
            poll.poll(1000 * max(timeout_s, 0.0))

    def close(self) -> None:
        self._connection.close()


class GuardedPair:
    """What both ends have: a guard and the connection beside the data."""

    def __init__(self, end: str) -> None:
        self.guard = EndGuard(end)
        self._link: PairLink | None = None

    @contextlib.contextmanager
    def use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure tells the other side at once."""
        with self.guard.use(what, deadline):
            try:
                yield
            except BaseException:
                self._hang_up()
                raise

    def hold(self, link: PairLink) -> None:
        """Keep the connection until the end is closed or fails."""
        self._link = link

    def check(self) -> None:
        """Raise unless both processes live and the pair is connected."""
        if self._link is None:
            raise StateError("a round before connect")
        self._link.check()

    def close(self) -> None:
        self.guard.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
