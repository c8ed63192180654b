"""cuda_ipc: the worker copies straight out of the trainer's GPU memory, mapped once; two processes of one host.

The trainer exports the allocations that its weights lie in, as plain handles of 64 bytes; the worker maps each once and
replays the plan on a stream of its own. ``send`` waits for the trainer's GPU, whatever stream the weights were written on;
``receive`` returns when the copies are done. A quiet TCP connection between the two brings the news of a dead process.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from weightcast.cuda.wait import DeviceWait
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, NotShared, PeerLost, ProtocolError, TransportError, Unsupported
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.gpu_exports import Exports, Mapping, MappingOffer, check_exports, index_of, process_identity
from weightcast.transports.gpu_pull import GpuPull
from weightcast.transports.pairlink import GuardedPair, PairLink
from weightcast.transports.rendezvous import Listener
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import repr_without

WARM_UP_S = 60.0
"""Of reaching memory anew for another GPU than ``connect`` found; ``connect`` has done it as a rule."""


class CudaIpcOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the trainer's storages can be mapped from, and where it listens."""

    mapping: MappingOffer
    address: str
    port: int
    secret: bytes

    __repr__ = repr_without("secret")


class CudaIpcTransport(Transport):
    """GPU memory of one host; pulls."""

    name = "cuda_ipc"
    pulls = True
    preference = 90

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        return (trainer.device, worker.device) == ("cuda", "cuda")

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Unsupported("needs a CUDA GPU")

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        if trainer.host != worker.host:
            return "other host, container or user"
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device != "cuda":
                return f"the {side}'s weights are on {facts.device}, cuda_ipc moves GPU memory"
        if not trainer.mappable:
            return "the trainer's allocator (backend:cudaMallocAsync) gives memory that nobody else can map"
        if trainer.gpu == worker.gpu:
            return None
        if trainer.gpu not in worker.visible_gpus:
            return f"the worker cannot see the trainer's GPU {trainer.gpu} (widen CUDA_VISIBLE_DEVICES of the engine)"
        theirs, ours = index_of(trainer.gpu), index_of(worker.gpu)
        if theirs is not None and ours is not None and not torch.cuda.can_device_access_peer(ours, theirs):
            return f"GPU {worker.gpu} cannot reach the memory of GPU {trainer.gpu}"
        return None

    def adopt(self, memory: Memory) -> Memory:
        """The memory stays where it is."""
        if any(not storage.is_cuda for storage in memory.storages):
            raise InvalidInput("cuda_ipc moves GPU memory only", field="device")
        return memory

    def release(self, memory: Memory) -> None:
        pass

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        return CudaIpcTrainerEnd(copies, memory, address or "127.0.0.1")

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(CudaIpcOffer))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"malformed cuda_ipc offer: {error}") from None
        check_exports(decoded.mapping.segments, decoded.mapping.spans, copies)
        return CudaIpcWorkerEnd(copies, decoded)


class CudaIpcTrainerEnd(TrainerEnd):
    """Keeps the memory alive and exported; a round is one wait for the GPU."""

    def __init__(self, copies: Sequence[Copy], memory: Memory, address: str) -> None:
        self._pair = GuardedPair("the trainer's end of a cuda_ipc pair")
        self._memory = memory
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        devices = dict.fromkeys(memory.storages[copy.src_storage].device for copy in copies)
        self._waits = [DeviceWait(device) for device in devices]
        self._exports = Exports(copies, memory)
        self._listener = Listener(address, self._pair.guard)
        self._offer = CudaIpcOffer(
            mapping=MappingOffer(
                process=process_identity(),
                segments=self._exports.segments,
                spans=self._exports.spans,
                is_arena=memory.is_arena,
            ),
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
            self._pair.hold(link)
            link.meet(deadline)

    def send(self, deadline: Deadline, part: int = 0) -> int:
        with self._pair.use("send", deadline):
            self._pair.check()
            for wait in self._waits:
                wait.wait(deadline, "the work on the trainer's GPU", self._pair.guard.check)
            return self._nbytes[part]

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._listener.close()
        for wait in self._waits:
            wait.close()
        self._exports.close()
        self._memory = Memory([])


class CudaIpcWorkerEnd(WorkerEnd):
    """Maps the trainer's allocations once, then replays the plan out of them."""

    def __init__(self, copies: Sequence[Copy], offer: CudaIpcOffer) -> None:
        self._pair = GuardedPair("the worker's end of a cuda_ipc pair")
        self._offer = offer
        what = "the copy out of the trainer's GPU memory"
        self._pull = GpuPull(copies, lambda device, _: Mapping(offer.mapping, device), self._pair.guard.check, what)

    def connect(self, deadline: Deadline) -> None:
        """Map the memory for the current GPU; ``receive`` maps it anew if its memory lies on another."""
        with self._pair.use("connect", deadline):
            offer = self._offer
            link = PairLink.dial_to(offer.address, offer.port, offer.secret, deadline, self._pair.guard)
            self._pair.hold(link)
            try:
                self._pull.connect(deadline)
            except TransportError as error:
                if isinstance(error, PeerLost):
                    raise
                raise NotShared(f"cannot map the trainer's GPU memory: {error.message}") from error
            link.meet(deadline)

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:
        """Build the tables of the memory's replay and compile its kernels, partly on the current stream.

        TransportError when the end is dead, PeerLost when the trainer is, StateError before ``connect``.
        """
        self._pair.guard.check()
        self._pair.check()
        self._pull.warm_up(memory, manifest, Deadline(WARM_UP_S))

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self.has_written = False
        with self._pair.use("receive", deadline):
            self._pair.check()
            try:
                nbytes = self._pull.receive(memory, deadline, part)
            finally:
                self.has_written = self._pull.has_written
            # Bytes of a process that died meanwhile may be anybody's.
            self._pair.check()
            return nbytes

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """A trainer that dies while its bytes are copied is no failure: the digest says whether they are the right ones."""
        if memory.gpu is not None:
            return self.receive(memory, deadline, part), None
        self.has_written = False
        with self._pair.use("receive", deadline):
            self._pair.check()
            try:
                return self._pull.receive_proven(memory, manifest, deadline, part)
            finally:
                self.has_written = self._pull.has_written

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._pull.close()
