"""The two ends of a tcp pair, and the offer by which they meet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from weightcast.cuda.wait import DeviceWait
from weightcast.deadline import MOST_S, Deadline
from weightcast.delta import Form
from weightcast.errors import ProtocolError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, copies_digest
from weightcast.transports.base import TrainerEnd, WorkerEnd
from weightcast.transports.buckets import Bucket
from weightcast.transports.changed import Changing
from weightcast.transports.connection import Connection
from weightcast.transports.counted import Counted, Sums, counted
from weightcast.transports.kept import Kept, KeptBuckets, forms_of, shared_pieces
from weightcast.transports.lanes import HEADER, Lanes, Parts
from weightcast.transports.movers import Mover, mover_for
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import SECRET_NBYTES, Listener, dial
from weightcast.transports.spans import Loading, Unloading
from weightcast.transports.told import CHANGES, CHECKED, VALUES, Told, told
from weightcast.untrusted.secret import repr_without

LANES = 2
MAX_LANES = 16


class EdgeOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's neighbours in a chain of workers that feed each other (see the relays module)."""

    fed_secret: Annotated[bytes, msgspec.Meta(max_length=SECRET_NBYTES)]
    """What the worker before this one is met by; empty for the first of a chain."""
    feeds_secret: Annotated[bytes, msgspec.Meta(max_length=SECRET_NBYTES)]
    """What the worker after this one is met by; empty for the last of a chain."""
    patience_s: Annotated[float, msgspec.Meta(gt=0, le=MOST_S)]
    """A neighbour that is silent, or takes nothing, for so long is given up."""

    __repr__ = repr_without("fed_secret", "feeds_secret")


class TcpOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the trainer listens for this pair, and what the worker must agree on."""

    address: str
    port: int
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_NBYTES, max_length=SECRET_NBYTES)]
    bucket_nbytes: int
    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)]
    plan: str
    """Digest of the copies."""
    identity: bytes = b""
    """Certificate and private key (PEM) of a pair that talks TLS."""
    changes: bool = False
    """Whether rounds may bring changes."""
    edge: EdgeOffer | None = None
    """Where workers feed each other."""

    __repr__ = repr_without("secret", "identity")


class TcpTrainerEnd(TrainerEnd):
    """Sends; listens on ``address`` from the start."""

    def __init__(
        self,
        copies: Sequence[Copy],
        memory: Memory,
        bucket_nbytes: int,
        address: str,
        identity: bytes = b"",
        edge: EdgeOffer | None = None,
    ) -> None:
        self._lanes = Lanes("the trainer's end of a tcp pair")
        self._parts = Parts(copies, bucket_nbytes)
        lanes = max(1, min(LANES, self._parts.most))
        mover = mover_for(memory, copies, self._lanes.guard.check, is_source=True)
        buffers = mover.buffers(self._parts.buckets, lanes)
        self._loadings = {
            part: [Loading(bucket, memory, buffers[i % len(buffers)], mover) for i, bucket in enumerate(buckets)]
            for part, (buckets, _) in self._parts.of.items()
        }
        self._key = (memory.number, copies_digest(copies), bucket_nbytes)
        self._kept: KeptBuckets | None = None
        self._sent = 0
        """The last round that was sent and kept."""
        devices = {memory.storages[copy.src_storage].device for copy in copies}
        self._waits = [DeviceWait(device) for device in devices if device.type == "cuda"]
        self._listener = Listener(address, self._lanes.guard)
        self._offer = TcpOffer(
            address=address,
            port=self._listener.port,
            secret=self._listener.secret,
            bucket_nbytes=bucket_nbytes,
            lanes=lanes,
            plan=self._key[1],
            identity=identity,
            edge=edge,
        )

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(self._offer, changes=self._kept is not None))

    def connect(self, deadline: Deadline) -> None:
        with self._lanes.guard.use("connect", deadline):
            self._lanes.add(*self._listener.accept(deadline, self._offer.lanes))
            self._lanes.start_tls(self._offer.identity, deadline, server=True)
        self._listener.close()

    def send(self, deadline: Deadline, part: int = 0) -> int:
        with self._lanes.guard.use("send", deadline):
            self._send(deadline, part, 0)
            return self._parts.of[part][1]

    def _send(self, deadline: Deadline, part: int, start: int) -> None:
        """Send a part's buckets from ``start`` on."""
        (buckets, _), loadings = self._parts.of[part], self._loadings[part]
        self._wait(deadline)

        def work(bucket: int, number: int, connection: Connection) -> None:
            loading = loadings[bucket]
            loading.run(deadline)
            header = HEADER.pack(number, buckets[bucket].nbytes, VALUES)
            connection.send([header, *loading.spans], deadline, "sending over tcp")

        self._lanes.run(len(buckets), work, start=start)

    def keep(self, kept: Kept, content: str, manifest: Manifest) -> None:
        buckets = self._parts.of[0][0]
        self._kept = kept.buckets(self._key, content, lambda: KeptBuckets(buckets, forms_of(buckets), manifest))

    def look(self, number: int, deadline: Deadline) -> None:
        kept, loadings = self._kept, self._loadings[0]
        assert kept is not None
        with self._lanes.guard.use("look for changes", deadline):
            self._wait(deadline)

            def work(bucket: int, lane: int) -> None:
                kept.take(bucket, number, lambda: _fresh(loadings[bucket], deadline))

            self._lanes.share(len(loadings), work)

    def send_kept(self, number: int, deadline: Deadline, *, changes: bool) -> int:
        kept, loadings, before = self._kept, self._loadings[0], self._sent if changes else 0
        buckets, _ = self._parts.of[0]
        assert kept is not None
        with self._lanes.guard.use("send", deadline):
            self._wait(deadline)
            sent = [0] * len(loadings)

            def work(bucket: int, place: int, connection: Connection) -> None:
                change = kept.take(bucket, number, lambda: _fresh(loadings[bucket], deadline))
                kind, data = told(change, before, buckets[bucket].nbytes) or (VALUES, kept.image(bucket))
                sent[bucket] = len(data)
                connection.send([HEADER.pack(place, len(data), kind), data], deadline, "sending over tcp")

            self._lanes.run(len(loadings), work)
            self._sent = number
            return sum(sent)

    def _wait(self, deadline: Deadline) -> None:
        for wait in self._waits:
            wait.wait(deadline, "the work on the trainer's GPU", self._lanes.guard.check)

    def abort(self) -> None:
        self._lanes.abort()

    def close(self) -> None:
        self._lanes.close()
        self._listener.close()
        self._kept = None
        for wait in self._waits:
            wait.close()
        self._loadings = {}


def _fresh(loading: Loading, deadline: Deadline) -> list[npt.NDArray[np.uint8]]:
    loading.run(deadline)
    return loading.values()


class TcpWorkerEnd(WorkerEnd):
    """Receives."""

    def __init__(self, copies: Sequence[Copy], offer: TcpOffer) -> None:
        self._lanes = Lanes("the worker's end of a tcp pair")
        self._offer = offer
        self._parts = Parts(copies, offer.bucket_nbytes)
        self._copies = tuple(copies)
        self._sides: Recent[_Side] = Recent()
        self._last: list[Told | None] = []
        """The changes that the last round brought, by bucket; None for a bucket of which all values came."""
        self.has_written = False

    def connect(self, deadline: Deadline) -> None:
        offer, lanes = self._offer, self._lanes
        with lanes.guard.use("connect", deadline):
            for lane in range(offer.lanes):
                lanes.add(dial(offer.address, offer.port, offer.secret, deadline, lanes.guard, lane=lane))
            lanes.start_tls(offer.identity, deadline, server=False)

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:
        if self._offer.changes:
            self._sides.get(memory.number, lambda: self._side_of(memory)).count(manifest)

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        return self._receive(memory, deadline, part)

    @property
    def can_repeat(self) -> bool:  # type: ignore[override]
        return bool(self._last) and all(told is not None for told in self._last)

    def receive_changes(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, *, is_behind: bool = False
    ) -> tuple[int, int | None]:
        side = self._sides.get(memory.number, lambda: self._side_of(memory))
        side.count(manifest)
        sums: list[Sums | None] = [None] * len(self._parts.of[0][0])
        nbytes = self._receive(memory, deadline, 0, sums, is_behind=is_behind)
        known = [some for some in sums if some is not None]
        return nbytes, sum(some.change for some in known) if len(known) == len(sums) else None

    def _receive(
        self,
        memory: Memory,
        deadline: Deadline,
        part: int,
        sums: list[Sums | None] | None = None,
        *,
        is_behind: bool = False,
    ) -> int:
        """``sums``: changes may come, and this is where digests of what they change go, by bucket."""
        with self._lanes.guard.use("receive", deadline):
            self.has_written = False
            buckets, nbytes = self._parts.of[part]
            side = self._sides.get(memory.number, lambda: self._side_of(memory))
            side.mover.begin()
            last, self._last = self._last, [None] * len(buckets)
            unloadings = side.unloadings(part)

            def work(bucket: int, number: int, connection: Connection) -> None:
                what = "receiving over tcp"
                header = connection.receive_bytes(HEADER.size, deadline, what)
                came, size, kind = HEADER.unpack(header)
                is_told = came == number and kind in (CHANGES, CHECKED) and size < buckets[bucket].nbytes
                if sums is not None and is_told:
                    told = Told.of(kind, connection.receive_bytes(size, deadline, what))
                    several = [each for each in (last[bucket] if is_behind else None, told) if each]
                    changing = side.changing(bucket)
                    read = [changing.read(each) for each in several]
                    self.has_written = True
                    sums[bucket] = changing.apply(read, lambda work: side.mover.run(work, deadline))
                    self._last[bucket] = told
                    return
                self._take(header, connection, buckets[bucket], unloadings[bucket], number, deadline)

            self._lanes.run(len(buckets), work)
            return nbytes

    def _take(
        self,
        header: bytes,
        connection: Connection,
        bucket: Bucket,
        unloading: Unloading,
        number: int,
        deadline: Deadline,
    ) -> None:
        """Receive the values of the bucket whose header has come, to where they land."""
        came, size, kind = HEADER.unpack(header)
        if (came, size, kind) != (number, bucket.nbytes, VALUES):
            raise ProtocolError(f"bucket {came} of {size} bytes came where bucket {number} was due")
        self.has_written = True
        connection.receive(unloading.spans, deadline, "receiving over tcp")
        unloading.run(deadline)

    def abort(self) -> None:
        self._lanes.abort()

    def close(self) -> None:
        self._lanes.close()
        self._sides.clear()

    def _side_of(self, memory: Memory) -> _Side:
        mover = mover_for(memory, self._copies, self._lanes.guard.check, is_source=False)
        return _Side(self._parts, memory, mover, self._offer.lanes)


class _Side:
    """How buckets get into one memory of the worker's. Buffers that nothing is packed into are never touched."""

    def __init__(self, parts: Parts, memory: Memory, mover: Mover, lanes: int) -> None:
        self._parts, self._memory, self.mover = parts, memory, mover
        self._buffers = mover.buffers(parts.buckets, lanes)
        self._unloadings: dict[int, list[Unloading]] = {}
        self._changing: dict[int, Changing] = {}
        self._counted: list[Counted] | None = None
        self._is_counted = False

    @cached_property
    def forms(self) -> list[Form]:
        """Those of the buckets of weights that lie still."""
        return forms_of(self._parts.of[0][0])

    @cached_property
    def shared(self) -> list[set[int]]:
        """Pieces whose places others write, too, by bucket."""
        return shared_pieces(self._parts.of[0][0])

    def count(self, manifest: Manifest) -> None:
        """Have digests taken of what changes, from now on, where that can be done. Compiled once."""
        if not self._is_counted:
            self._counted, self._is_counted = counted(self._parts.of[0][0], self.forms, manifest), True

    def changing(self, bucket: int) -> Changing:
        """What applies changes of a bucket, compiled once."""
        if bucket not in self._changing:
            count = None if self._counted is None else self._counted[bucket]
            of = (self._parts.of[0][0][bucket], self.forms[bucket], self._memory, count, self.shared[bucket])
            self._changing[bucket] = Changing(*of)
        return self._changing[bucket]

    def unloadings(self, part: int) -> list[Unloading]:
        """Those of a part's buckets, compiled once."""
        if part not in self._unloadings:
            buffers, mover = self._buffers, self.mover
            self._unloadings[part] = [
                Unloading(bucket, buffers[i % len(buffers)], self._memory, mover)
                for i, bucket in enumerate(self._parts.of[part][0])
            ]
        return self._unloadings[part]
