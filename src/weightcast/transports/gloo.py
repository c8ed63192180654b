"""gloo: packed buckets over TCP between two processes, for CPU memory on any hosts.

Load-bearing properties:

- One ProcessGroupGloo of two ranks per pair, made from a private store. No default group, nothing global: an application's own
  torch.distributed is not touched.
- The private store is one TCP connection (rendezvous module), not a TCPStore: a TCPStore listens on all interfaces, lets
  anybody in, and waits without limit for a server that is stopped.
- Two buffers per side: one bucket is on the wire while the next is packed (or the former unpacked).
- ``ProcessGroupGloo.abort`` does not end a blocked wait; a wait that times out does, as it closes the pair's connection, which
  ends every other wait on it here and at the peer. So ``abort`` lets a one-byte receive time out.
- Nothing on the wire is encrypted: use it inside a cluster's own network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import msgspec
import torch
from torch.distributed import ProcessGroupGloo, Work

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, PeerLost, PlanMismatch, ProtocolError, TransportError
from weightcast.known import known
from weightcast.memory import Memory
from weightcast.plan import Copy, plan_digest
from weightcast.replay import Replay
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import check_bucket_nbytes, new_buffers, packer, schedule, unpacker
from weightcast.transports.guard import EndGuard
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous_old import Listener, PairStore, dial

_TRAINER, _WORKER = 0, 1
_IN_FLIGHT = 2
_ABORT_TAG = 9


class GlooOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the trainer listens for this pair, and what the worker must agree on."""

    address: str
    port: int
    secret: bytes
    bucket_nbytes: int
    plan: str
    """Digest of the copies."""


class GlooTransport(Transport):
    """CPU memory over TCP; pushes."""

    name = "gloo"
    pulls = False

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device != "cpu":
                return f"the {side}'s weights are on {facts.device}, gloo moves CPU memory"
        return None

    def adopt(self, memory: Memory) -> Memory:
        return memory

    def release(self, memory: Memory) -> None:
        return None

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        check_bucket_nbytes(bucket_nbytes)
        return GlooTrainerEnd(copies, memory, bucket_nbytes, address or "127.0.0.1")

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(GlooOffer))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"malformed gloo offer: {error}") from None
        try:
            check_bucket_nbytes(decoded.bucket_nbytes)
        except InvalidInput as error:
            raise ProtocolError(f"malformed gloo offer: {error}") from None
        if decoded.plan != _digest(copies):
            raise PlanMismatch("trainer and worker compiled different copies for this pair")
        return GlooWorkerEnd(copies, decoded)


class _Pair:
    """The process group of one pair with the rules of an end around it; both ends have one."""

    def __init__(self, end: str, rank: int) -> None:
        self.guard = EndGuard(end)
        self._rank = rank
        # Any: torch's stubs lack most of its methods.
        self._group: Any = None

    def join(self, store: PairStore, deadline: Deadline) -> None:
        """Make the group; both sides meet in here."""
        options = cast(Any, ProcessGroupGloo)._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname=store.local_address, lazy_init=False)]
        options._timeout = deadline.limit()
        options._threads = 1
        try:
            self._group = ProcessGroupGloo(store, self._rank, 2, options)
        except RuntimeError as error:
            if store.error is not None:
                raise store.error from None
            raise self._named(error, deadline, "connecting") from error

    def start_send(self, buffer: torch.Tensor, tag: int, deadline: Deadline) -> Work:
        with self._errors(deadline, "sending"):
            return cast(Work, self._live().send([buffer], 1 - self._rank, tag))

    def start_receive(self, buffer: torch.Tensor, tag: int, deadline: Deadline) -> Work:
        with self._errors(deadline, "receiving"):
            return cast(Work, self._live().recv([buffer], 1 - self._rank, tag))

    def wait(self, work: Work, deadline: Deadline, what: str) -> None:
        with self._errors(deadline, what), deadline.waking(self._break):
            # Gloo cuts the limit to whole milliseconds; without one more it would end before the deadline does.
            work.wait(deadline.limit() + timedelta(milliseconds=2))

    def abort(self) -> None:
        self.guard.abort()
        self._break()

    def _break(self) -> None:
        """End every wait, here and at the peer."""
        group = self._group
        if group is None:
            return
        with contextlib.suppress(RuntimeError):
            poison = torch.empty(1, dtype=torch.uint8)
            group.recv([poison], 1 - self._rank, _ABORT_TAG).wait(timedelta(milliseconds=1))

    def close(self) -> None:
        self.guard.close()
        # Gloo's threads and sockets end with the last reference.
        self._group = None

    def _live(self) -> Any:
        self.guard.check()
        if self._group is None:
            raise TransportError("the pair is not connected", hint="Call connect() first")
        return self._group

    @contextlib.contextmanager
    def _errors(self, deadline: Deadline, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TransportError):
                raise
            raise self._named(error, deadline, what) from error

    def _named(self, error: RuntimeError, deadline: Deadline, what: str) -> Exception:
        """Gloo has one exception for everything; who aborted and what time it is tell what happened."""
        if self.guard.aborted:
            return TransportError(f"{what} was aborted")
        if deadline.passed:
            return DeadlineExceeded(f"{what} over gloo took longer than {deadline.timeout_s:g} s")
        return PeerLost(f"the other side is gone while {what} over gloo: {str(error).splitlines()[0]}")


class GlooTrainerEnd(TrainerEnd):
    """Packs and sends; listens on ``address`` from the start."""

    def __init__(self, copies: Sequence[Copy], memory: Memory, bucket_nbytes: int, address: str) -> None:
        self._pair = _Pair("the trainer's end of a gloo pair", _TRAINER)
        self._buckets = schedule(copies, bucket_nbytes)
        self._nbytes = sum(copy.nbytes for copy in copies)
        self._buffers = new_buffers(self._buckets, _IN_FLIGHT)
        self._packers = [
            packer(bucket, memory, self._buffers[i % _IN_FLIGHT]) for i, bucket in enumerate(self._buckets)
        ]
        self._listener = Listener(address, self._pair.guard)
        self._offer = GlooOffer(
            address=address,
            port=self._listener.port,
            secret=self._listener.secret,
            bucket_nbytes=bucket_nbytes,
            plan=_digest(copies),
        )

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._offer)

    def connect(self, deadline: Deadline) -> None:
        with self._pair.guard.use("connect", deadline), self._listener.accept(deadline) as store:
            self._pair.join(store, deadline)
        self._listener.close()

    def send(self, deadline: Deadline) -> int:
        with self._pair.guard.use("send", deadline):
            flying: dict[int, Work] = {}
            for i, (bucket, pack) in enumerate(zip(self._buckets, self._packers, strict=True)):
                slot = i % _IN_FLIGHT
                if slot in flying:
                    self._pair.wait(flying.pop(slot), deadline, "sending")
                pack.run()
                flying[slot] = self._pair.start_send(self._buffers[slot][: bucket.nbytes], slot, deadline)
            for work in flying.values():
                self._pair.wait(work, deadline, "sending")
            return self._nbytes

    def abort(self) -> None:
        self._pair.abort()

    def close(self) -> None:
        self._pair.close()
        self._listener.close()
        self._packers, self._buffers = [], []


class GlooWorkerEnd(WorkerEnd):
    """Receives and unpacks."""

    def __init__(self, copies: Sequence[Copy], offer: GlooOffer) -> None:
        self._pair = _Pair("the worker's end of a gloo pair", _WORKER)
        self._offer = offer
        self._nbytes = sum(copy.nbytes for copy in copies)
        self._buckets = schedule(copies, offer.bucket_nbytes)
        self._buffers = new_buffers(self._buckets, _IN_FLIGHT)
        self._unpackers: Recent[list[Replay]] = Recent()

    def connect(self, deadline: Deadline) -> None:
        offer = self._offer
        with (
            self._pair.guard.use("connect", deadline),
            dial(offer.address, offer.port, offer.secret, deadline, self._pair.guard) as store,
        ):
            self._pair.join(store, deadline)

    def receive(self, memory: Memory, deadline: Deadline) -> int:
        with self._pair.guard.use("receive", deadline):
            flying = [self._start(i, deadline) for i in range(min(_IN_FLIGHT, len(self._buckets)))]
            for i, unpack in enumerate(self._compiled(memory)):
                self._pair.wait(flying[i], deadline, "receiving")
                unpack.run()
                if i + _IN_FLIGHT < len(self._buckets):
                    flying.append(self._start(i + _IN_FLIGHT, deadline))
            return self._nbytes

    def abort(self) -> None:
        self._pair.abort()

    def close(self) -> None:
        self._pair.close()
        self._unpackers.clear()
        self._buffers = []

    def _start(self, i: int, deadline: Deadline) -> Work:
        slot = i % _IN_FLIGHT
        return self._pair.start_receive(self._buffers[slot][: self._buckets[i].nbytes], slot, deadline)

    def _compiled(self, memory: Memory) -> list[Replay]:
        return self._unpackers.get(
            memory.number,
            lambda: [unpacker(bucket, self._buffers[i % _IN_FLIGHT], memory) for i, bucket in enumerate(self._buckets)],
        )


def _digest(copies: Sequence[Copy]) -> str:
    return plan_digest({0: tuple(copies)})
