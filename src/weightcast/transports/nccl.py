"""nccl: GPU to GPU on any host, one communicator for a trainer rank and all workers that want the same of it.

A bucket is packed (cast, gathered) by one kernel, is broadcast, and is unpacked by one kernel; two are in flight. A single worker
is broadcast to, as well: NCCL uses more channels for that than for a send. Workers that want different things have communicators
of their own, side by side: grouped sends in a common one are slower (docs/performance.md). A quiet TCP connection between the trainer and
each worker brings the news of a death at once, which NCCL itself does not, and says which worker is late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from weightcast.cuda.lanes import Lanes
from weightcast.cuda.nccl import ABORT_S, PROMPT_ABORT_S, UNIQUE_ID_NBYTES, Communicator, load_nccl
from weightcast.deadline import Deadline
from weightcast.errors import (
    InvalidInput,
    ProtocolError,
    StateError,
    WeightcastError,
)
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import Bucket, check_bucket_nbytes, out_of_bucket
from weightcast.transports.guard import EndGuard
from weightcast.transports.nccl_cut import TRAINER, NcclOffer, cuts_of, device_of, lanes_for, parts_in_buckets
from weightcast.transports.nccl_group import Group
from weightcast.transports.pairlink import PairLink
from weightcast.transports.recent import Recent
from weightcast.untrusted.known import known

if TYPE_CHECKING:
    from weightcast.cuda.replay import CudaReplay

DRAIN_S = 5.0
"""How long closing waits for what is still queued."""


class NcclTransport(Transport):
    """GPU memory, any host; pushes."""

    name = "nccl"
    pulls = False
    preference = 50

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        return (trainer.device, worker.device) == ("cuda", "cuda")

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
        return list(Group(count, copies, memory, bucket_nbytes, address or "127.0.0.1").ends)

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


class NcclWorkerEnd(WorkerEnd):
    """Receives and unpacks."""

    def __init__(self, copies: Sequence[Copy], offer: NcclOffer) -> None:
        self._guard = EndGuard("the worker's end of a nccl pair")
        self._offer = offer
        self._copies = tuple(copies)
        self._parts = parts_in_buckets(copies, offer.bucket_nbytes)
        if cuts_of(self._parts) != offer.cuts:
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
            self._lanes = lanes_for(self._parts, device)
            self._comm = Communicator(device, self._check)
            self._comm.connect(offer.unique_id, offer.rank, offer.world_size, deadline)

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        with self._use("receive", deadline):
            comm, lanes, link = self._comm, self._lanes, self._link
            if comm is None or lanes is None or link is None:
                raise StateError("a round before connect")
            device = self._devices.get(
                memory.number, lambda: device_of(memory, [copy.dst_storage for copy in self._copies])
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
                    comm.broadcast(lanes.buffer(number)[: bucket.nbytes], TRAINER, deadline)
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
