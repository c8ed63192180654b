"""nccl: GPU to GPU on any host, one communicator of two ranks for each pair; buckets packed on one stream while others travel.

A bucket is packed (cast, gathered) by one kernel, travels, and is unpacked by one kernel; two are in flight. It travels as a
broadcast to one: NCCL uses more channels for that than for a send. A quiet TCP connection between the two processes brings
the news of a death at once, which NCCL itself does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from weightcast.cuda.nccl import ABORT_S, PROMPT_ABORT_S, UNIQUE_ID_NBYTES, Communicator, load_nccl, new_unique_id
from weightcast.cuda.wait import new_event, new_stream
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, ProtocolError, StateError
from weightcast.memory import Memory
from weightcast.plan import Copy
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import Bucket, check_bucket_nbytes, into_bucket, new_buffers, out_of_bucket, schedule
from weightcast.transports.guard import EndGuard
from weightcast.transports.pairlink import PairLink
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import Listener

if TYPE_CHECKING:
    from weightcast.cuda.replay import CudaReplay

IN_FLIGHT = 2
"""Buffers: one is packed or unpacked while the other travels."""
_TRAINER, _WORKER = 0, 1


class NcclOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The communicator's id, the bucket size that both sides cut by, and where the trainer listens."""

    unique_id: bytes
    bucket_nbytes: int
    address: str
    port: int
    secret: bytes


class NcclTransport(Transport):
    """GPU memory, any host; pushes."""

    name = "nccl"
    pulls = False

    def __init__(self) -> None:
        load_nccl()

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device != "cuda":
                return f"the {side}'s weights are on {facts.device}, nccl moves GPU memory"
        if trainer.host == worker.host and trainer.pid == worker.pid:
            return "trainer and worker are one process"
        return None

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
        return NcclTrainerEnd(copies, memory, bucket_nbytes, address or "127.0.0.1")

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=NcclOffer)
            check_bucket_nbytes(decoded.bucket_nbytes)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidInput) as error:
            raise ProtocolError(f"malformed nccl offer: {error}") from None
        if len(decoded.unique_id) != UNIQUE_ID_NBYTES:
            raise ProtocolError(f"nccl offer: an id of {len(decoded.unique_id)} bytes")
        return NcclWorkerEnd(copies, decoded)


class _Lanes:
    """The buffers of one end and the order of work in them: what a lane holds is used up before it is filled again."""

    def __init__(self, buckets: Sequence[Bucket], device: torch.device) -> None:
        self._device = device
        self.buffers = new_buffers(buckets, IN_FLIGHT, device)
        self.side = new_stream(device)
        """Packs or unpacks; the communicator's own stream sends or receives."""
        self._free: list[torch.cuda.Event | None] = [None] * IN_FLIGHT

    def buffer(self, number: int, nbytes: int) -> torch.Tensor:
        return self.buffers[number % IN_FLIGHT][:nbytes]

    def packers(self, buckets: Sequence[Bucket], memory: Memory) -> list[CudaReplay]:
        """Per bucket the copies from ``memory`` into its lane."""
        # Triton comes with torch for CUDA only; without a GPU this module still has to say what it lacks.
        from weightcast.cuda.replay import CudaReplay

        return [
            CudaReplay([into_bucket(piece) for piece in bucket.pieces], memory, self._lane(number), self._device)
            for number, bucket in enumerate(buckets)
        ]

    def unpackers(self, buckets: Sequence[Bucket], memory: Memory) -> list[CudaReplay]:
        """Per bucket the copies from its lane into ``memory``."""
        from weightcast.cuda.replay import CudaReplay

        return [
            CudaReplay([out_of_bucket(piece) for piece in bucket.pieces], self._lane(number), memory, self._device)
            for number, bucket in enumerate(buckets)
        ]

    def _lane(self, number: int) -> Memory:
        return Memory([self.buffers[number % IN_FLIGHT]])

    def free(self, number: int) -> torch.cuda.Event | None:
        """When the bucket before last, which used the same buffer, is through; None for the first ones."""
        return self._free[number % IN_FLIGHT]

    def mark_free(self, number: int, stream: torch.cuda.Stream) -> None:
        event = new_event()
        event.record(stream)
        self._free[number % IN_FLIGHT] = event


class _Pair:
    """What both ends have: a guard, the connection beside the data, the communicator."""

    def __init__(self, end: str) -> None:
        self.guard = EndGuard(end)
        self.link: PairLink | None = None
        self.comm: Communicator | None = None

    @contextlib.contextmanager
    def use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure frees the other side at once."""
        with self.guard.use(what, deadline):
            try:
                yield
            except BaseException:
                self._hang_up(PROMPT_ABORT_S)
                raise

    def connect(self, link: PairLink, device: torch.device, unique_id: bytes, rank: int, deadline: Deadline) -> None:
        self.link = link
        self.comm = Communicator(device, self._check)
        self.comm.connect(unique_id, rank, 2, deadline)

    def connected(self) -> Communicator:
        if self.comm is None:
            raise StateError("a round before connect")
        return self.comm

    def close(self) -> None:
        self.guard.close()
        self._hang_up(ABORT_S)

    def _hang_up(self, wait_s: float) -> None:
        if self.link is not None:
            self.link.close()
        if self.comm is not None:
            self.comm.abort(wait_s)

    def _check(self) -> None:
        self.guard.check()
        if self.link is not None:
            self.link.check()


class NcclTrainerEnd(TrainerEnd):
    """Packs and sends."""

    def __init__(self, copies: Sequence[Copy], memory: Memory, bucket_nbytes: int, address: str) -> None:
        self._pair = _Pair("the trainer's end of a nccl pair")
        self._device = _device_of(memory, [copy.src_storage for copy in copies])
        self._buckets = schedule(copies, bucket_nbytes)
        self._lanes = _Lanes(self._buckets, self._device)
        self._packers = self._lanes.packers(self._buckets, memory)
        self._nbytes = sum(copy.nbytes for copy in copies)
        self._listener = Listener(address, self._pair.guard)
        self._offer = NcclOffer(
            unique_id=new_unique_id(),
            bucket_nbytes=bucket_nbytes,
            address=address,
            port=self._listener.port,
            secret=self._listener.secret,
        )

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._offer)

    def connect(self, deadline: Deadline) -> None:
        with self._pair.use("connect", deadline):
            link = PairLink.accept_from(self._listener, deadline)
            self._listener.close()
            self._pair.connect(link, self._device, self._offer.unique_id, _TRAINER, deadline)

    def send(self, deadline: Deadline) -> int:
        with self._pair.use("send", deadline), torch.cuda.device(self._device):
            comm, lanes = self._pair.connected(), self._lanes
            lanes.side.wait_stream(torch.cuda.current_stream(self._device))
            for number, (bucket, packer) in enumerate(zip(self._buckets, self._packers, strict=True)):
                if (free := lanes.free(number)) is not None:
                    comm.wait(free, deadline, "sending weights")
                with torch.cuda.stream(lanes.side):
                    packer.run()
                comm.stream.wait_stream(lanes.side)
                comm.broadcast(lanes.buffer(number, bucket.nbytes), _TRAINER, deadline)
                lanes.mark_free(number, comm.stream)
            comm.finish(deadline, "sending weights")
            return self._nbytes

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._listener.close()


class NcclWorkerEnd(WorkerEnd):
    """Receives and unpacks."""

    def __init__(self, copies: Sequence[Copy], offer: NcclOffer) -> None:
        self._pair = _Pair("the worker's end of a nccl pair")
        self._offer = offer
        self._copies = tuple(copies)
        self._buckets = schedule(copies, offer.bucket_nbytes)
        self._nbytes = sum(copy.nbytes for copy in copies)
        self._lanes: _Lanes | None = None
        self._unpackers: Recent[list[CudaReplay]] = Recent()
        self._devices: Recent[torch.device] = Recent()

    def connect(self, deadline: Deadline) -> None:
        """Meets the trainer on the current GPU, which ``receive``'s memory has to lie on."""
        with self._pair.use("connect", deadline):
            offer = self._offer
            link = PairLink.dial_to(offer.address, offer.port, offer.secret, deadline, self._pair.guard)
            device = torch.device("cuda", torch.cuda.current_device())
            self._lanes = _Lanes(self._buckets, device)
            self._pair.connect(link, device, offer.unique_id, _WORKER, deadline)

    def receive(self, memory: Memory, deadline: Deadline) -> int:
        with self._pair.use("receive", deadline):
            comm, lanes = self._pair.connected(), self._lanes
            assert lanes is not None
            device = self._devices.get(
                memory.number, lambda: _device_of(memory, [copy.dst_storage for copy in self._copies])
            )
            if device != comm.device:
                raise StateError(f"this pair was connected on {comm.device}, the memory lies on {device}")
            unpackers = self._unpackers.get(memory.number, lambda: lanes.unpackers(self._buckets, memory))
            with torch.cuda.device(device):
                lanes.side.wait_stream(torch.cuda.current_stream(device))
                for number, (bucket, unpacker) in enumerate(zip(self._buckets, unpackers, strict=True)):
                    if (free := lanes.free(number)) is not None:
                        comm.wait(free, deadline, "receiving weights")
                    comm.broadcast(lanes.buffer(number, bucket.nbytes), _TRAINER, deadline)
                    lanes.side.wait_stream(comm.stream)
                    with torch.cuda.stream(lanes.side):
                        unpacker.run()
                    lanes.mark_free(number, lanes.side)
                comm.stream.wait_stream(lanes.side)
                comm.finish(deadline, "receiving weights")
            return self._nbytes

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._unpackers.clear()
        self._lanes = None


def _device_of(memory: Memory, storages: Sequence[int]) -> torch.device:
    if memory.gpu is not None:
        return memory.gpu
    devices = {memory.storages[storage].device for storage in storages}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        raise InvalidInput(f"one end of a nccl pair uses the memory of one GPU, not {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())
