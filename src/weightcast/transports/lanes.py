"""Lanes: the connections of one end of a tcp pair, the threads that drive them, and what goes over them.

Wire, on lane ``i % lanes`` for the i-th bucket of those that are sent: ``HEADER``, then the bucket, or its changes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from weightcast.deadline import Deadline
from weightcast.errors import TransportError
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.buckets import schedule
from weightcast.transports.connection import Connection
from weightcast.transports.guard import EndGuard

HEADER = struct.Struct("!QQB")
"""Of a bucket: its number since the pair connected, the bytes that follow, and what they are (see told)."""


class Lanes:
    """The connections of one end, and the threads that drive them. A failure of one lane ends all."""

    def __init__(self, end: str) -> None:
        self.guard = EndGuard(end)
        self._connections: list[Connection] = []
        self._pool: ThreadPoolExecutor | None = None
        self._num_sent = 0

    @property
    def first(self) -> Connection:
        """The first lane; TransportError before there is one."""
        if not self._connections:
            raise TransportError("the pair is not connected", hint="Call connect() first")
        return self._connections[0]

    @property
    def num_sent(self) -> int:
        """The number that the next bucket has on the wire."""
        return self._num_sent

    def add(self, *connections: Connection) -> None:
        """Have these connections, too; they are closed with the end."""
        self._connections += connections

    def start_tls(self, identity: bytes, deadline: Deadline, *, server: bool) -> None:
        """Go on encrypted where the pair has an identity."""
        start_tls(self._connections, identity, deadline, server=server)

    def run(self, count: int, work: Callable[[int, int, Connection], None], *, start: int = 0) -> None:
        """Call ``work(bucket, number on the wire, connection)`` for each of ``count`` buckets from ``start`` on, those of a lane in
        order. All ``count`` of them have a number."""
        connections = [self.first, *self._connections[1:]]
        first = self._num_sent
        self._num_sent += count
        self.share(count, lambda bucket, lane: work(bucket, first + bucket, connections[lane]), start=start)

    def share(self, count: int, work: Callable[[int, int], None], *, start: int = 0) -> None:
        """Call ``work(bucket, lane)`` for each of ``count`` buckets from ``start`` on, those of a lane in order, on a thread of its own."""
        lanes = min(len(self._connections), count - start)

        def drive(lane: int) -> None:
            try:
                for bucket in range(start + lane, count, lanes):
                    work(bucket, lane)
            except BaseException:
                self.hang_up()
                raise

        futures = [self._threads().submit(drive, lane) for lane in range(1, lanes)]
        errors: list[BaseException] = []
        if lanes:
            _collect(errors, lambda: drive(0))
        for future in futures:
            _collect(errors, future.result)
        if errors:
            # What went wrong first is not what the lanes that were ended because of it say.
            raise next((error for error in errors if not isinstance(error, TransportError)), errors[0])

    def beside(self, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` on a thread of the end's own, beside the lanes."""
        return self._threads().submit(work)

    def abort(self) -> None:
        self.guard.abort()
        self.hang_up()

    def hang_up(self) -> None:
        for connection in self._connections:
            connection.hang_up()

    def close(self) -> None:
        self.guard.close()
        self.hang_up()
        if self._pool is not None:
            self._pool.shutdown()
        for connection in self._connections:
            connection.close()
        self._connections = []

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self._connections), thread_name_prefix="weightcast-tcp")
        return self._pool


def start_tls(connections: Sequence[Connection], identity: bytes, deadline: Deadline, *, server: bool) -> None:
    """Have connections go on encrypted where there is an identity (see certificates)."""
    if identity:
        from weightcast.transports.certificates import pinned

        context = pinned(identity, server=server)
        for connection in connections:
            connection.start_tls(context, deadline, server=server)


def _collect(errors: list[BaseException], call: Callable[[], None]) -> None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - raised by the caller once no lane runs any more
        errors.append(error)


class Parts:
    """The buckets, and the bytes that land, of each part."""

    def __init__(self, copies: Sequence[Copy], bucket_nbytes: int) -> None:
        self.of = {part: (schedule(some, bucket_nbytes), nbytes_of(some)) for part, some in parts_of(copies).items()}
        self.buckets = [bucket for buckets, _ in self.of.values() for bucket in buckets]
        self.most = max(len(buckets) for buckets, _ in self.of.values())
