"""Edges: the connections between workers of a chain that feed each other (see the relays module). What fails here is given up.

A worker listens for the one after it at the address from which it reaches the trainer. Both know a secret that the trainer made for
this edge alone, and prove that to each other as the two sides of a pair do.
"""

from __future__ import annotations

import ipaddress
import logging
import struct
import threading
from collections.abc import Sequence

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, ProtocolError, TransportError
from weightcast.transports.connection import Connection
from weightcast.transports.guard import EndGuard
from weightcast.transports.lanes import HEADER, start_tls
from weightcast.transports.rendezvous import Listener, dial
from weightcast.transports.spans import Loading
from weightcast.transports.told import VALUES, WAITING

logger = logging.getLogger(__name__)

PLACE = struct.Struct("!16sH")
"""An IP address, that of IPv4 as one of IPv6, and a port; port 0 for nowhere."""
NOWHERE = PLACE.pack(bytes(16), 0)
SIGNS = 8
"""How often a relay that waits says so within the time after which it counts as silent."""


class Landed:
    """Which buckets of a part have landed: noted by the threads that receive, awaited by the one that feeds."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._buckets: set[int] = set()
        self._is_over = False

    def note(self, bucket: int) -> None:
        with self._changed:
            self._buckets.add(bucket)
            self._changed.notify_all()

    def stop(self) -> None:
        """No bucket lands any more: end all waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait(self, bucket: int, timeout_s: float) -> bool:
        """Whether a bucket has landed, now or within the timeout. TransportError once none lands any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or bucket in self._buckets, timeout_s)
            if bucket not in self._buckets and self._is_over:
                raise TransportError("this worker gets no more bytes itself")
            return bucket in self._buckets


class Edge:
    """One side of an edge. ``is_given_up``: it failed, and is not used again."""

    def __init__(self, secret: bytes, identity: bytes, guard: EndGuard) -> None:
        self._secret, self._identity, self._guard = secret, identity, guard
        self._connection: Connection | None = None
        self.is_given_up = False

    def give_up(self) -> None:
        """Use the edge no more, and let the other side know."""
        self.is_given_up = True
        self.close()

    def hang_up(self) -> None:
        """End a call that uses the edge; any thread."""
        connection = self._connection
        if connection is not None:
            connection.hang_up()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.hang_up()
            connection.close()

    def _open(self, connection: Connection, deadline: Deadline, *, server: bool) -> Connection:
        try:
            start_tls([connection], self._identity, deadline, server=server)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection


class Source(Edge):
    """The side of the worker that is fed."""

    def connected(self, place: bytes, deadline: Deadline) -> Connection:
        """The connection to the worker that listens at ``place``."""
        if self._connection is not None:
            return self._connection
        packed, port = PLACE.unpack(place)
        address = ipaddress.IPv6Address(packed)
        connection = dial(str(address.ipv4_mapped or address), port, self._secret, deadline, self._guard)
        return self._open(connection, deadline, server=False)

    def header(self, connection: Connection, deadline: Deadline, patience_s: float) -> bytes:
        """The header of the next bucket, for which the other side may wait as long as it says so now and then."""
        while True:
            part = deadline.part(at_most_s=patience_s)
            header = connection.receive_bytes(HEADER.size, part, "waiting for a word of the worker that feeds this one")
            if HEADER.unpack(header)[2] != WAITING:
                return header


class Feeder(Edge):
    """The side of the worker that feeds, listening at ``address`` from the start."""

    def __init__(self, address: str, secret: bytes, identity: bytes, guard: EndGuard) -> None:
        super().__init__(secret, identity, guard)
        self._listener = Listener(address, guard, secret)
        ip = ipaddress.ip_address(address.partition("%")[0])
        mapped = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
        self.place = PLACE.pack(mapped, self._listener.port)

    def feed(
        self,
        loadings: Sequence[Loading],
        sizes: Sequence[int],
        landed: Landed,
        first: int,
        patience_s: float,
        deadline: Deadline,
    ) -> None:
        """Send a part's buckets to the other side, each once it has landed. ``first`` is the number of the first one on the wire.

        Gives the edge up, and raises nothing, where the other side does not come, is gone, or takes nothing for ``patience_s``.
        """
        what = "feeding the next worker"
        try:
            connection = self._connected(deadline.part(at_most_s=patience_s))
            for bucket, (loading, nbytes) in enumerate(zip(loadings, sizes, strict=True)):
                while not landed.wait(bucket, patience_s / SIGNS):
                    sign = HEADER.pack(first + bucket, 0, WAITING)
                    connection.send([sign], deadline.part(at_most_s=patience_s), what)
                loading.run(deadline)
                header = HEADER.pack(first + bucket, nbytes, VALUES)
                connection.send([header, *loading.spans], deadline.part(at_most_s=patience_s), what)
        except (TransportError, ProtocolError, DeadlineExceeded) as error:
            self.give_up()
            logger.warning("the next worker is fed no more, and asks the trainer: %s", error)

    def close(self) -> None:
        super().close()
        self._listener.close()

    def _connected(self, deadline: Deadline) -> Connection:
        if self._connection is None:
            (connection,) = self._listener.accept(deadline)
            self._open(connection, deadline, server=True)
            self._listener.close()
        assert self._connection is not None
        return self._connection
