"""nixl: the worker reads the trainer's registered memory by plan, over whatever UCX finds: RDMA, NVLink, shared memory or TCP; pulls.

The trainer's memory is registered once, whatever the number of workers. A worker reads ranges of that memory into buckets of its own, some
in flight at a time, by lists that both sides' NIXL has prepared, and copies out of the buckets by the plan: what a read that is late still
writes is a bucket, never a weight. Each part of a round ends with a receipt for the trainer. A quiet TCP connection between the two
brings the news of a dead process, and proves to each who the other is, which NIXL does not.

Taken by itself where both hosts have RDMA devices and nothing nearer works; else ask for it by ``transport="nixl"``.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import torch

from weightcast.cuda.wait import DeviceWait
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotShared,
    PlanMismatch,
    ProtocolError,
    StateError,
    TransportError,
)
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, copies_digest, nbytes_of, parts_of
from weightcast.transports.base import Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import check_bucket_nbytes
from weightcast.transports.nixl_agent import PAIR_NBYTES, RECEIPT, Agent, Extent, load_nixl
from weightcast.transports.nixl_memory import Exposed, Exposures
from weightcast.transports.nixl_reader import Reader, Source, Unfinished
from weightcast.transports.pairlink import GuardedPair, PairLink
from weightcast.transports.reads import Range, ReadBucket, read_buckets
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import SECRET_NBYTES, Listener
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import repr_without

MAX_METADATA_NBYTES = 16 * 2**20
MAX_NAME_LENGTH = 64
NO_WAY = "See which transports and networks UCX may take (UCX_TLS, UCX_NET_DEVICES), or use another transport"
PROBE_NBYTES = 64
PROBE_S = 10.0
"""How long the first few bytes may take that a worker reads when it connects: a network that loses them is passed over then."""


class NixlOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the trainer's storages lie, how NIXL reaches them, and where the trainer listens."""

    agent: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA_NBYTES)]
    extents: tuple[Extent, ...]
    """The storages, by number."""
    device: Literal["cpu", "cuda"]
    bucket_nbytes: int
    pair: Annotated[bytes, msgspec.Meta(min_length=PAIR_NBYTES, max_length=PAIR_NBYTES)]
    address: str
    port: int
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_NBYTES, max_length=SECRET_NBYTES)]
    plan: str
    """Digest of the copies."""

    __repr__ = repr_without("secret", "metadata")


class NixlTransport(Transport):
    """Any memory, over what UCX finds; pulls."""

    name = "nixl"
    pulls = True
    preference = 60
    default_bucket_nbytes = 32 * 2**20

    def __init__(self) -> None:
        load_nixl()
        self._exposures = Exposures()
        self._unfinished = Unfinished()

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        """Where there is no RDMA, tcp is as fast and reaches nothing but what it was asked for."""
        return trainer.rdma and worker.rdma

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device not in ("cpu", "cuda"):
                return f"the {side}'s weights are on {facts.device}, nixl moves memory of CPUs and CUDA GPUs"
        return None

    def adopt(self, memory: Memory) -> Memory:
        """The memory stays where it is. It is registered with the first pair: another transport may move it before."""
        self._exposures.keep(memory)
        return memory

    def release(self, memory: Memory) -> None:
        self._exposures.release(memory)

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = default_bucket_nbytes, address: str = ""
    ) -> TrainerEnd:
        check_bucket_nbytes(bucket_nbytes)
        return NixlTrainerEnd(copies, memory, self._exposures, bucket_nbytes, address or "127.0.0.1")

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(NixlOffer))
            check_bucket_nbytes(decoded.bucket_nbytes)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidInput) as error:
            raise ProtocolError(f"malformed nixl offer: {error}") from None
        if decoded.plan != copies_digest(copies):
            raise PlanMismatch("trainer and worker compiled different copies for this pair")
        _check_extents(decoded, copies)
        self._unfinished.sweep()
        return NixlWorkerEnd(copies, decoded, self._unfinished)


class NixlTrainerEnd(TrainerEnd):
    """Keeps the memory registered; a round is one wait for the GPU, where the weights are on one."""

    def __init__(
        self, copies: Sequence[Copy], memory: Memory, exposures: Exposures, bucket_nbytes: int, address: str
    ) -> None:
        self._ends = GuardedPair("the trainer's end of a nixl pair")
        self._exposures, self._memory = exposures, memory
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self._pair = secrets.token_bytes(PAIR_NBYTES)
        self._num_sent = 0
        self._waits = [DeviceWait(device) for device in _gpus(memory, copies)]
        self._listener = Listener(address, self._ends.guard)
        try:
            self._exposed: Exposed | None = exposures.lend(memory)
        except BaseException:
            self._listener.close()
            raise
        self._exposed.expect(self._pair)
        self._offer = NixlOffer(
            agent=self._exposed.agent.name,
            metadata=self._exposed.metadata,
            extents=tuple(Extent.of(storage) for storage in memory.storages),
            device="cuda" if self._exposed.device.type == "cuda" else "cpu",
            bucket_nbytes=bucket_nbytes,
            pair=self._pair,
            address=address,
            port=self._listener.port,
            secret=self._listener.secret,
            plan=copies_digest(copies),
        )

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._offer)

    def connect(self, deadline: Deadline) -> None:
        with self._ends.use("connect", deadline):
            link = PairLink.accept_from(self._listener, deadline)
            self._listener.close()
            self._ends.hold(link)
            link.meet(deadline)

    def send(self, deadline: Deadline, part: int = 0) -> int:
        """Returns once the values are there. ProtocolError where the worker has read more often than that was so."""
        with self._ends.use("send", deadline):
            self._ends.check()
            exposed = self._exposed
            if exposed is None:
                raise StateError("a round before connect")
            if exposed.receipts(self._pair) > self._num_sent:
                raise ProtocolError("the worker has read weights before they were there")
            for wait in self._waits:
                wait.wait(deadline, "the work on the trainer's GPU", self._ends.guard.check)
            self._num_sent += 1
            return self._nbytes[part]

    def abort(self) -> None:
        self._ends.guard.abort()

    def close(self) -> None:
        self._ends.close()
        self._listener.close()
        for wait in self._waits:
            wait.close()
        exposed, self._exposed = self._exposed, None
        if exposed is not None:
            exposed.forget(self._pair)
            self._exposures.give_back(self._memory)
        self._memory = Memory([])


class NixlWorkerEnd(WorkerEnd):
    """Reads into buckets, and copies out of them."""

    def __init__(self, copies: Sequence[Copy], offer: NixlOffer, unfinished: Unfinished) -> None:
        self._ends = GuardedPair("the worker's end of a nixl pair")
        self._offer, self._unfinished = offer, unfinished
        self._copies = tuple(copies)
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self._parts = {part: read_buckets(some, offer.bucket_nbytes) for part, some in parts_of(copies).items()}
        self._source = Source(offer.agent, offer.extents, torch.device(offer.device))
        self._agent: Agent | None = None
        self._readers: list[Reader] = []
        self._devices: Recent[torch.device] = Recent()
        self._num_received = 0
        self.has_written = False

    def connect(self, deadline: Deadline) -> None:
        """Meet the trainer, and read a few bytes. NotShared where NIXL does not reach a trainer that is there."""
        with self._ends.use("connect", deadline):
            offer = self._offer
            link = PairLink.dial_to(offer.address, offer.port, offer.secret, deadline, self._ends.guard)
            self._ends.hold(link)
            self._agent = Agent()
            link.meet(deadline)
            try:
                self._agent.meet(offer.metadata, offer.agent)
            except TransportError as error:
                self._check()
                raise NotShared(f"NIXL does not reach the trainer: {error.message}", hint=NO_WAY) from error
            self._probe(self._agent, deadline)

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:
        """Make the buckets, and prepare lists and reads."""
        self._ends.guard.check()
        self._reader_for(memory).compile(memory, self._check)

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self.has_written = False
        with self._ends.use("receive", deadline):
            self._ends.check()
            agent = self._agent
            if agent is None:
                raise StateError("a round before connect")
            reader = self._reader_for(memory)
            try:
                reader.run(memory, part, deadline, self._check)
            finally:
                self.has_written = reader.has_written
            self._num_received += 1
            agent.tell(self._offer.agent, RECEIPT.pack(self._offer.pair, self._num_received))
            return self._nbytes[part]

    def abort(self) -> None:
        self._ends.guard.abort()

    def close(self) -> None:
        """Reads that are still in flight keep their buckets, and the agent, until they end."""
        self._ends.close()
        agent, self._agent = self._agent, None
        readers, self._readers = self._readers, []
        if agent is not None:
            self._unfinished.close(agent, readers)

    def _reader_for(self, memory: Memory) -> Reader:
        """The reader into buckets on the device where ``memory`` lies."""
        agent = self._agent
        if agent is None:
            raise StateError("a round before connect")
        device = self._devices.get(memory.number, lambda: _device_of(memory, self._copies))
        for reader in self._readers:
            if reader.device == device:
                return reader
        self._readers.append(Reader(agent, self._source, self._parts, device))
        return self._readers[-1]

    def _probe(self, agent: Agent, deadline: Deadline) -> None:
        """Read some bytes of the trainer's. It is there: what keeps them away is the way that NIXL takes."""
        first = next((bucket.ranges[0] for some in self._parts.values() for bucket in some), None)
        if first is None:
            return
        few = Range(first.storage, first.start, min(first.nbytes, PROBE_NBYTES), 0)
        bucket = ReadBucket(ranges=(few,), copies=(), nbytes=few.nbytes)
        try:
            reader = Reader(agent, self._source, {0: (bucket,)}, torch.device("cpu"))
            self._readers.append(reader)
            reader.read_once(Deadline(min(PROBE_S, deadline.remaining_s())), self._check)
        except (TransportError, DeadlineExceeded) as error:
            self._check()
            deadline.check("connect")
            raise NotShared(f"NIXL does not reach the trainer: {error.message}", hint=NO_WAY) from error
        self._readers.remove(reader)
        reader.close()

    def _check(self) -> None:
        self._ends.guard.check()
        self._ends.check()


def _gpus(memory: Memory, copies: Sequence[Copy]) -> list[torch.device]:
    devices = dict.fromkeys(memory.storages[copy.src_storage].device for copy in copies)
    return [device for device in devices if device.type == "cuda"]


def _device_of(memory: Memory, copies: Sequence[Copy]) -> torch.device:
    devices = {memory.storages[copy.dst_storage].device for copy in copies if copy.nbytes}
    if len(devices) > 1:
        raise InvalidInput(f"weights on several devices: {sorted(map(str, devices))}", field="device")
    return devices.pop() if devices else torch.device("cpu")


def _check_extents(offer: NixlOffer, copies: Sequence[Copy]) -> None:
    """Raise ProtocolError where a copy would read outside of the storages that the trainer offers."""
    for extent in offer.extents:
        if min(extent) < 0 or extent.address + extent.nbytes >= 2**64 or extent.device >= 2**16:
            raise ProtocolError("nixl offer: a storage lies outside of all memory")
    for copy in copies:
        if not copy.nbytes:
            continue
        end = (copy.src_offset + geo.span(copy.sizes, copy.src_strides)) * itemsize_of(copy.src_dtype)
        if copy.src_storage >= len(offer.extents) or end > offer.extents[copy.src_storage].nbytes:
            raise ProtocolError(f"nixl offer: {copy.region.name} lies outside of storage {copy.src_storage}")


__all__ = ["NixlOffer", "NixlTransport"]
