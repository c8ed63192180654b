"""nccl: GPU to GPU on any host, one communicator for a trainer rank and all workers that want the same of it.

A bucket is packed (cast, gathered) by one kernel, is broadcast, and is unpacked by one kernel; two are in flight. A single worker
is broadcast to, as well: NCCL uses more channels for that than for a send. Workers that want different things have communicators
of their own, side by side: grouped sends in a common one are slower (docs/performance.md). A quiet TCP connection between the trainer and
each worker brings the news of a death at once, which NCCL itself does not, and says which worker is late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from weightcast.cuda.lanes import Lanes
from weightcast.cuda.nccl import ABORT_S, PROMPT_ABORT_S, UNIQUE_ID_NBYTES, Communicator, load_nccl, new_unique_id
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    InvalidInput,
    ProtocolError,
    StateError,
    TransportError,
    WeightcastError,
)
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import Bucket, check_bucket_nbytes, into_bucket, out_of_bucket, schedule
from weightcast.transports.guard import EndGuard
from weightcast.transports.pairlink import PairLink
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import Listener
from weightcast.transports.together import Blamed, Together
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import repr_without

if TYPE_CHECKING:
    from weightcast.cuda.replay import CudaReplay

DRAIN_S = 5.0
"""How long closing waits for what is still queued."""
_STEP_S = 0.02
_TRAINER = 0
"""The trainer's rank in a communicator; workers follow in the order of the group."""


class NcclOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The communicator's id, the worker's place in it, how the plan is cut (with the bytes of each bucket, to see that both sides
    cut alike), and where the trainer listens."""

    unique_id: bytes
    rank: int
    world_size: int
    bucket_nbytes: int
    cuts: tuple[int, ...]
    address: str
    port: int
    secret: bytes

    __repr__ = repr_without("secret", "unique_id")


class NcclTransport(Transport):
    """GPU memory, any host; pushes."""

    name = "nccl"
    pulls = False
    default_bucket_nbytes = 256 * 2**20  # queueing a bucket takes as long as NVLink takes for 30 MiB

    def __init__(self) -> None:
        load_nccl()

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device != "cuda":
                return f"the {side}'s weights are on {facts.device}, nccl moves GPU memory"
        if trainer.host == worker.host and trainer.pid == worker.pid:
            return "trainer and worker are one process"
        if _seat(trainer) == _seat(worker):
            return "NCCL refuses two ranks on one GPU (unless NCCL_HOSTID differs between the processes)"
        return None

    def sharing(self, workers: Sequence[Facts]) -> list[list[int]]:
        """All, but for workers on one GPU: NCCL refuses them in one communicator."""
        groups: list[dict[tuple[str, str], int]] = []
        for number, facts in enumerate(workers):
            free = next((group for group in groups if _seat(facts) not in group), None)
            if free is None:
                groups.append(free := {})
            free[_seat(facts)] = number
        return [list(group.values()) for group in groups]

    def adopt(self, memory: Memory) -> Memory:
        """The memory stays where it is."""
        if any(not storage.is_cuda for storage in memory.storages):
            raise InvalidInput("nccl moves GPU memory only", field="device")
        return memory

    def release(self, memory: Memory) -> None:
        pass

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        return self.trainer_ends(1, copies, memory, bucket_nbytes=bucket_nbytes, address=address)[0]

    def trainer_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        address: str = "",
    ) -> list[TrainerEnd]:
        """The ends of one group, which share a communicator."""
        return list(_Group(count, copies, memory, bucket_nbytes, address or "127.0.0.1").ends)

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(NcclOffer))
            check_bucket_nbytes(decoded.bucket_nbytes)
            if len(decoded.unique_id) != UNIQUE_ID_NBYTES:
                raise ProtocolError(f"nccl offer: an id of {len(decoded.unique_id)} bytes")
            if not 0 < decoded.rank < decoded.world_size:
                raise ProtocolError(f"nccl offer: worker rank {decoded.rank} of {decoded.world_size}")
            return NcclWorkerEnd(copies, decoded)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidInput) as error:
            raise ProtocolError(f"malformed nccl offer: {error}") from None


class _Group:
    """The trainer's side of one communicator: packs and sends for all workers of the group at once."""

    def __init__(self, count: int, copies: Sequence[Copy], memory: Memory, bucket_nbytes: int, address: str) -> None:
        self._device = _device_of(memory, [copy.src_storage for copy in copies])
        self._parts = _parts_in_buckets(copies, bucket_nbytes)
        lanes = _lanes_for(self._parts, self._device)
        self._lanes: Lanes | None = lanes
        self._packers = {
            part: [
                lanes.packer(number, list(map(into_bucket, bucket.pieces)), memory)
                for number, bucket in enumerate(buckets)
            ]
            for part, buckets in self._parts.items()
        }
        self._together = Together(count)
        self._num_broadcasts = 0
        self._in_use = set(range(count))
        self._comm = Communicator(self._device, self._check)
        self.nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self.ends: list[NcclTrainerEnd] = []
        unique_id, cuts = new_unique_id(), _cuts_of(self._parts)
        try:
            for member in range(count):
                guard = EndGuard("the trainer's end of a nccl pair")
                listener = Listener(address, guard)
                offer = NcclOffer(
                    unique_id=unique_id,
                    rank=member + 1,
                    world_size=count + 1,
                    bucket_nbytes=bucket_nbytes,
                    cuts=cuts,
                    address=address,
                    port=listener.port,
                    secret=listener.secret,
                )
                self.ends.append(NcclTrainerEnd(self, member, guard, listener, offer))
        except BaseException:
            for end in self.ends:
                end.close()
            raise
        self._unique_id = unique_id

    def connect(self, member: int, deadline: Deadline) -> None:
        """Meet all workers; every member's end calls it once its worker's connection is there."""

        def meet() -> None:
            self._comm.connect(self._unique_id, _TRAINER, len(self.ends) + 1, deadline)

        self._together.do(member, "connect", deadline, meet, self.ends[member].check)

    def send(self, member: int, deadline: Deadline, part: int) -> None:
        """One part of a round for the whole group; every member's end calls it."""
        self._together.do(member, "send", deadline, lambda: self._send(deadline, part), self.ends[member].check)

    def fail(self, error: BaseException, member: int) -> None:
        """End everything for all members, because of one; the workers learn it from their connections."""
        self._together.fail(error, member)
        self._hang_up(PROMPT_ABORT_S)

    def close(self, member: int) -> None:
        """End it for all members; the last one to close frees the buffers. Idempotent."""
        self._together.fail(TransportError("an end of the group was closed"), member)
        self._hang_up(ABORT_S)
        self._in_use.discard(member)
        if not self._in_use:
            self._packers, self._lanes = {}, None

    def _send(self, deadline: Deadline, part: int) -> None:
        comm, lanes = self._comm, self._lanes
        if lanes is None:
            raise StateError("the group was closed")
        before = self._num_broadcasts
        after = before + len(self._parts[part])
        try:
            self._wait_for_workers(min(before + 1, after), deadline)
            self._broadcast(comm, lanes, deadline, part)
            # What NCCL keeps in its own buffers is sent for the trainer, while a late worker may still hold up those behind it.
            self._wait_for_workers(after, deadline)
        except DeadlineExceeded as error:
            member = self._latest()
            if member is None:
                raise
            late = DeadlineExceeded(f"the worker did not receive in time: {error.message}")
            raise Blamed(member, late) from error
        self._num_broadcasts = after

    def _broadcast(self, comm: Communicator, lanes: Lanes, deadline: Deadline, part: int) -> None:
        with lanes.beside():
            for number, (bucket, packer) in enumerate(zip(self._parts[part], self._packers[part], strict=True)):
                if (former := lanes.take(number, lanes.side)) is not None:
                    comm.wait(former, deadline, "sending weights")
                packer.run()
                comm.stream.wait_stream(lanes.side)
                comm.broadcast(lanes.buffer(number)[: bucket.nbytes], _TRAINER, deadline)
                lanes.mark(number, comm.stream)
            comm.finish(deadline, "sending weights")

    def _wait_for_workers(self, launched: int, deadline: Deadline) -> None:
        """Return when all workers have come to so many broadcasts, in all rounds."""
        absent = list(self.ends)
        while absent := [end for end in absent if end.num_launched() < launched]:
            self._check()
            deadline.check("waiting for a worker to receive")
            PairLink.wait_any(
                [end.link for end in absent if end.link is not None], min(_STEP_S, deadline.remaining_s())
            )

    def _latest(self) -> int | None:
        """The worker that came to fewer broadcasts than any other, which NCCL does not tell; None where that is not one."""
        launched = sorted((end.num_launched(), end.member) for end in self.ends)
        return None if len(launched) > 1 and launched[0][0] == launched[1][0] else launched[0][1]

    def _check(self) -> None:
        """During every wait for NCCL: raises for the member whose worker is gone or whose end was aborted."""
        for end in self.ends:
            try:
                end.check()
            except WeightcastError as error:
                raise Blamed(end.member, error) from error

    def _hang_up(self, wait_s: float) -> None:
        for end in self.ends:
            end.hang_up()
        self._comm.abort(wait_s)


class NcclTrainerEnd(TrainerEnd):
    """One worker's place in a group."""

    def __init__(self, group: _Group, member: int, guard: EndGuard, listener: Listener, offer: NcclOffer) -> None:
        self._group, self.member = group, member
        self._guard, self._listener, self._offer = guard, listener, offer
        self.link: PairLink | None = None

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._offer)

    def connect(self, deadline: Deadline) -> None:
        with self._use("connect", deadline):
            self.link = PairLink.accept_from(self._listener, deadline)
            self._listener.close()
            self._group.connect(self.member, deadline)

    def send(self, deadline: Deadline, part: int = 0) -> int:
        with self._use("send", deadline):
            if self.link is None:
                raise StateError("a round before connect")
            self._group.send(self.member, deadline, part)
            return self._group.nbytes[part]

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        self._listener.close()
        self._group.close(self.member)

    def check(self) -> None:
        """Raise when the end was aborted, or its worker is gone."""
        self._guard.check()
        if self.link is not None:
            self.link.check()

    def num_launched(self) -> int:
        """Broadcasts that the worker has come to, in all rounds."""
        return self.link.num_calls() if self.link is not None else 0

    def hang_up(self) -> None:
        """Let the worker know that nothing comes any more."""
        if self.link is not None:
            self.link.close()

    @contextlib.contextmanager
    def _use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure ends it for the whole group at once."""
        try:
            with self._guard.use(what, deadline):
                yield
        except BaseException as error:
            self._group.fail(error, self.member)
            raise


class NcclWorkerEnd(WorkerEnd):
    """Receives and unpacks."""

    def __init__(self, copies: Sequence[Copy], offer: NcclOffer) -> None:
        self._guard = EndGuard("the worker's end of a nccl pair")
        self._offer = offer
        self._copies = tuple(copies)
        self._parts = _parts_in_buckets(copies, offer.bucket_nbytes)
        if _cuts_of(self._parts) != offer.cuts:
            raise ProtocolError("the trainer cuts the plan otherwise", hint="Use the same weightcast on both sides")
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self._link: PairLink | None = None
        self._comm: Communicator | None = None
        self._lanes: Lanes | None = None
        self._unpackers: Recent[list[CudaReplay]] = Recent(parts=len(self._parts))
        self._devices: Recent[torch.device] = Recent()

    def connect(self, deadline: Deadline) -> None:
        """Meets the trainer on the current GPU, which ``receive``'s memory has to lie on."""
        with self._use("connect", deadline):
            offer = self._offer
            self._link = PairLink.dial_to(offer.address, offer.port, offer.secret, deadline, self._guard)
            device = torch.device("cuda", torch.cuda.current_device())
            self._lanes = _lanes_for(self._parts, device)
            self._comm = Communicator(device, self._check)
            self._comm.connect(offer.unique_id, offer.rank, offer.world_size, deadline)

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        with self._use("receive", deadline):
            comm, lanes, link = self._comm, self._lanes, self._link
            if comm is None or lanes is None or link is None:
                raise StateError("a round before connect")
            device = self._devices.get(
                memory.number, lambda: _device_of(memory, [copy.dst_storage for copy in self._copies])
            )
            if device != comm.device:
                raise StateError(f"this pair was connected on {comm.device}, the memory lies on {device}")
            buckets = self._parts[part]
            unpackers = self._unpackers.get((memory.number, part), lambda: self._new_unpackers(lanes, buckets, memory))
            with lanes.beside():
                for number, (bucket, unpacker) in enumerate(zip(buckets, unpackers, strict=True)):
                    if (former := lanes.take(number, comm.stream)) is not None:
                        comm.wait(former, deadline, "receiving weights")
                    link.call()
                    comm.broadcast(lanes.buffer(number)[: bucket.nbytes], _TRAINER, deadline)
                    lanes.side.wait_stream(comm.stream)
                    unpacker.run()
                    lanes.mark(number, lanes.side)
                comm.stream.wait_stream(lanes.side)
                comm.finish(deadline, "receiving weights")
            return self._nbytes[part]

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        self._hang_up(ABORT_S)
        if self._lanes is not None:
            # Unpacking that was queued before a failure must not write into the next transfer.
            with contextlib.suppress(WeightcastError):
                self._lanes.drain(Deadline(DRAIN_S))
        self._unpackers.clear()
        self._lanes = None

    @staticmethod
    def _new_unpackers(lanes: Lanes, buckets: Sequence[Bucket], memory: Memory) -> list[CudaReplay]:
        return [
            lanes.unpacker(number, [out_of_bucket(piece) for piece in bucket.pieces], memory)
            for number, bucket in enumerate(buckets)
        ]

    @contextlib.contextmanager
    def _use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure frees the trainer at once."""
        with self._guard.use(what, deadline):
            try:
                yield
            except BaseException:
                self._hang_up(PROMPT_ABORT_S)
                raise

    def _check(self) -> None:
        self._guard.check()
        if self._link is not None:
            self._link.check()

    def _hang_up(self, wait_s: float) -> None:
        if self._link is not None:
            self._link.close()
        if self._comm is not None:
            self._comm.abort(wait_s)


def _seat(facts: Facts) -> tuple[str, str]:
    """What no two ranks of a communicator may have in common."""
    return facts.nccl_host, facts.gpu


_Parts = Mapping[int, Sequence[Bucket]]


def _parts_in_buckets(copies: Sequence[Copy], bucket_nbytes: int) -> _Parts:
    return {part: schedule(some, bucket_nbytes) for part, some in parts_of(copies).items()}


def _cuts_of(parts: _Parts) -> tuple[int, ...]:
    return tuple(bucket.nbytes for buckets in parts.values() for bucket in buckets)


def _lanes_for(parts: _Parts, device: torch.device) -> Lanes:
    return Lanes(max(_cuts_of(parts), default=0), device)


def _device_of(memory: Memory, storages: Sequence[int]) -> torch.device:
    if memory.gpu is not None:
        return memory.gpu
    devices = {memory.storages[storage].device for storage in storages}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        raise InvalidInput(f"one end of a nccl pair uses the memory of one GPU, not {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())
