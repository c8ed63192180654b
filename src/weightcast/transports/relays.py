"""Relays: workers of a chain that feed each other over tcp, so that bytes which all of them want come over a slow link once.

Load-bearing properties:

- Each worker has the lanes of an ordinary pair with the trainer, and beside them an edge from the worker before it. The trainer makes
  a secret for each edge and gives it to the two workers of that edge, so no worker can pass for another one, or for the trainer.
- The trainer sends what a worker asks for. The first of a chain asks for everything; a worker that is fed asks for nothing; a worker
  that is fed no more asks for the rest. A relay that dies, stops or is cut off costs the workers after it a wait and the trainer the
  bytes.
- A relay sends a bucket on from where the bucket landed, once it has landed, on one thread. Until then it says that it waits: silence
  means that the relay is of no use. An edge that failed is not used again before the pairs are set up anew.
- ``receive`` returns once the worker after this one has everything, or is given up: the memory may change afterwards.
- Nobody believes a relay. The digest that a worker has to show comes from the trainer, over the control channel.

Wire. On lane 0, when a worker has connected: its ``PLACE``, where it listens for the worker after it. Then for each part: from the
trainer the ``PLACE`` of the worker before it and whether to feed the worker after it (``TOLD``); from the worker ``WANTED``; and the buckets that it lacks, as in any pair. On an edge:
buckets as on a lane, in their order, and headers of the kind ``WAITING`` between them.
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Callable, Sequence

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, ProtocolError, TransportError
from weightcast.layout.memory import Memory
from weightcast.plan import Copy
from weightcast.transports.buckets import Bucket, travels_as
from weightcast.transports.connection import Connection
from weightcast.transports.counted import Sums
from weightcast.transports.edges import NOWHERE, PLACE, Feeder, Landed, Source
from weightcast.transports.guard import EndGuard
from weightcast.transports.lanes import HEADER, Parts
from weightcast.transports.movers import mover_for
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import SECRET_NBYTES
from weightcast.transports.spans import Loading, Unloading
from weightcast.transports.tcp_ends import EdgeOffer, TcpOffer, TcpTrainerEnd, TcpWorkerEnd

logger = logging.getLogger(__name__)

WANTED = struct.Struct("!QQ")
"""The number of the part's first bucket since the pair connected, and the first bucket of the part that has not come."""
TOLD = struct.Struct(f"!{PLACE.size}s?")
"""The place of the worker before this one, and whether this one feeds the one after it."""
PATIENT_SHARE = 0.25
"""Share of the time left that waiting for a neighbour may take."""


def can_relay(copies: Sequence[Copy]) -> bool:
    """Whether what travels is what lands: no worker casts."""
    return all(travels_as(copy) == copy.dst_dtype for copy in copies)


def chain(
    count: int,
    copies: Sequence[Copy],
    memory: Memory,
    bucket_nbytes: int,
    address: str,
    identity: bytes,
    patience_s: float,
) -> list[RelayedTrainerEnd]:
    """The trainer's ends for the workers of a chain, in its order."""
    keys = [b"", *(secrets.token_bytes(SECRET_NBYTES) for _ in range(count - 1)), b""]
    ends: list[RelayedTrainerEnd] = []
    try:
        for number in range(count):
            edge = EdgeOffer(fed_secret=keys[number], feeds_secret=keys[number + 1], patience_s=patience_s)
            before = ends[-1] if ends else None
            ends.append(RelayedTrainerEnd(copies, memory, bucket_nbytes, address, identity, edge, before))
    except BaseException:
        for end in ends:
            end.close()
        raise
    return ends


class RelayedTrainerEnd(TcpTrainerEnd):
    """Sends what its worker does not get from the worker before it."""

    def __init__(
        self,
        copies: Sequence[Copy],
        memory: Memory,
        bucket_nbytes: int,
        address: str,
        identity: bytes,
        edge: EdgeOffer,
        before: RelayedTrainerEnd | None,
    ) -> None:
        super().__init__(copies, memory, bucket_nbytes, address, identity, edge)
        self._before = before
        self._place = NOWHERE
        self._feeds = True

    @property
    def place(self) -> bytes:
        """Where its worker feeds the next one."""
        return self._place if self._lanes.guard.is_well else NOWHERE

    def connect(self, deadline: Deadline) -> None:
        super().connect(deadline)
        with self._lanes.guard.use("connect", deadline):
            self._place = self._lanes.first.receive_bytes(PLACE.size, deadline, "hearing where a worker listens")

    def feed(self, is_on: bool) -> None:
        self._feeds = is_on

    def send(self, deadline: Deadline, part: int = 0) -> int:
        lanes, buckets = self._lanes, self._parts.of[part][0]
        with lanes.guard.use("send", deadline):
            place = self._before.place if self._before is not None and self._feeds else NOWHERE
            lanes.first.send([TOLD.pack(place, self._feeds)], deadline, "saying who feeds a worker")
            wanted = lanes.first.receive_bytes(WANTED.size, deadline, "waiting for what a worker has got")
            number, start = WANTED.unpack(wanted)
            if number != lanes.num_sent or start > len(buckets):
                raise ProtocolError(f"a worker asks for bucket {start} of {len(buckets)}, counted from {number}")
            self._send(deadline, part, start)
            return sum(bucket.nbytes for bucket in buckets[start:])

    def close(self) -> None:
        super().close()
        self._before = None


class RelayedWorkerEnd(TcpWorkerEnd):
    """Receives from the worker before it, else from the trainer, and feeds the worker after it."""

    def __init__(self, copies: Sequence[Copy], offer: TcpOffer) -> None:
        super().__init__(copies, offer)
        assert offer.edge is not None
        self._edge, guard = offer.edge, self._lanes.guard
        self._source = Source(offer.edge.fed_secret, offer.identity, guard) if offer.edge.fed_secret else None
        self._feeder: Feeder | None = None
        self._loading: Recent[_LandedSide] = Recent()

    def connect(self, deadline: Deadline) -> None:
        super().connect(deadline)
        with self._lanes.guard.use("connect", deadline):
            lane = self._lanes.first
            if self._edge.feeds_secret:
                here = str(lane.socket.getsockname()[0])
                self._feeder = Feeder(here, self._edge.feeds_secret, self._offer.identity, self._lanes.guard)
            place = NOWHERE if self._feeder is None else self._feeder.place
            lane.send([place], deadline, "saying where this worker listens")

    def abort(self) -> None:
        super().abort()
        for edge in (self._source, self._feeder):
            if edge is not None:
                edge.hang_up()

    def close(self) -> None:
        super().close()
        for edge in (self._source, self._feeder):
            if edge is not None:
                edge.close()
        self._loading.clear()

    def _receive(
        self,
        memory: Memory,
        deadline: Deadline,
        part: int,
        sums: list[Sums | None] | None = None,
        *,
        is_behind: bool = False,
    ) -> int:
        lanes, (buckets, nbytes) = self._lanes, self._parts.of[part]
        with lanes.guard.use("receive", deadline):
            self.has_written = False
            side = self._sides.get(memory.number, lambda: self._side_of(memory))
            side.mover.begin()
            unloadings, landed = side.unloadings(part), Landed()
            patience_s = min(self._edge.patience_s, deadline.part(PATIENT_SHARE).timeout_s)
            place, feeds = TOLD.unpack(lanes.first.receive_bytes(TOLD.size, deadline, "hearing who feeds this worker"))
            wait_fed = self._feed(memory, part, landed, patience_s, deadline) if feeds else lambda: None
            try:
                start = self._fetch(place, buckets, unloadings, landed, patience_s, deadline)
                lanes.first.send([WANTED.pack(lanes.num_sent, start)], deadline, "asking for what has not come")

                def work(bucket: int, number: int, connection: Connection) -> None:
                    header = connection.receive_bytes(HEADER.size, deadline, "receiving over tcp")
                    self._take(header, connection, buckets[bucket], unloadings[bucket], number, deadline)
                    landed.note(bucket)

                lanes.run(len(buckets), work, start=start)
            except BaseException:
                landed.stop()
                raise
            finally:
                wait_fed()
            return nbytes

    def _fetch(
        self,
        place: bytes,
        buckets: Sequence[Bucket],
        unloadings: Sequence[Unloading],
        landed: Landed,
        patience_s: float,
        deadline: Deadline,
    ) -> int:
        """Receive from the worker before this one as much as comes. Returns the first bucket that did not come."""
        source, first, done = self._source, self._lanes.num_sent, 0
        if source is None or source.is_given_up or place == NOWHERE:
            return 0
        try:
            connection = source.connected(place, deadline.part(at_most_s=patience_s))
            for number, (bucket, unloading) in enumerate(zip(buckets, unloadings, strict=True), start=first):
                header = source.header(connection, deadline, patience_s)
                part = deadline.part(at_most_s=patience_s)
                self._take(header, connection, bucket, unloading, number, part)
                landed.note(done)
                done += 1
        except (TransportError, ProtocolError, DeadlineExceeded) as error:
            source.give_up()
            self._lanes.guard.check()
            deadline.check("receiving from another worker")
            text = "%d of %d buckets come from the trainer, and not from another worker: %s"
            logger.warning(text, len(buckets) - done, len(buckets), error)
        return done

    def _feed(
        self, memory: Memory, part: int, landed: Landed, patience_s: float, deadline: Deadline
    ) -> Callable[[], object]:
        """Begin to feed the worker after this one. What is returned waits until that is over."""
        feeder, first = self._feeder, self._lanes.num_sent
        if feeder is None or feeder.is_given_up:
            return lambda: None
        side = self._loading.get(memory.number, lambda: _LandedSide(self._parts, memory, self._lanes.guard))
        loadings, sizes = side.loadings(part), [bucket.nbytes for bucket in self._parts.of[part][0]]

        def work() -> None:
            feeder.feed(loadings, sizes, landed, first, patience_s, deadline)

        return self._lanes.beside(work).result


class _LandedSide:
    """How buckets are sent out of the memory in which they landed."""

    def __init__(self, parts: Parts, memory: Memory, guard: EndGuard) -> None:
        self._parts, self._memory = parts, memory
        copies = [piece.copy for bucket in parts.buckets for piece in _landed(bucket).pieces]
        self._mover = mover_for(memory, copies, guard.check, is_source=True)
        self._buffers = self._mover.buffers(parts.buckets, 1)
        self._loadings: dict[int, list[Loading]] = {}

    def loadings(self, part: int) -> list[Loading]:
        """Those of a part's buckets, compiled once. One is run and sent at a time."""
        if part not in self._loadings:
            buckets = self._parts.of[part][0]
            self._loadings[part] = [
                Loading(_landed(bucket), self._memory, self._buffers[0], self._mover) for bucket in buckets
            ]
        return self._loadings[part]


def _landed(bucket: Bucket) -> Bucket:
    """The bucket whose source is where this one's pieces land."""
    pieces = (msgspec.structs.replace(piece, copy=_from_landing(piece.copy)) for piece in bucket.pieces)
    return Bucket(pieces=tuple(pieces), nbytes=bucket.nbytes)


def _from_landing(copy: Copy) -> Copy:
    return msgspec.structs.replace(
        copy,
        src_storage=copy.dst_storage,
        src_dtype=copy.dst_dtype,
        src_offset=copy.dst_offset,
        src_strides=copy.dst_strides,
        via="",
    )
