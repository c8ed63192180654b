"""cuda_ipc: the worker copies straight out of the trainer's GPU memory, mapped once; two processes of one host.

The trainer exports the allocations that its weights lie in, as plain handles of 64 bytes; the worker maps each once and
replays the plan on a stream of its own. ``send`` waits for the trainer's GPU, whatever stream the weights were written on;
``receive`` returns when the copies are done. A quiet TCP connection between the two brings the news of a dead process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from weightcast.cuda import driver
from weightcast.cuda.wait import new_event, new_stream, wait_device, wait_event, wait_queued
from weightcast.deadline import Deadline
from weightcast.errors import (
    InvalidInput,
    NotShared,
    PeerLost,
    ProtocolError,
    StateError,
    TransportError,
    Unsupported,
    WeightcastError,
)
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.facts import gpu_uuid, visible_gpus
from weightcast.transports.guard import EndGuard
from weightcast.transports.pairlink import PairLink
from weightcast.transports.recent import Recent
from weightcast.transports.rendezvous import Listener
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import repr_without

if TYPE_CHECKING:
    from weightcast.content.proven_on_gpu import ProvenReplay
    from weightcast.cuda.replay import CudaReplay

logger = logging.getLogger(__name__)

DRAIN_S = 5.0
"""How long closing waits for copies that are still running."""


class _Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One allocation of the trainer. ``address`` is where the trainer itself sees it."""

    handle: bytes
    address: int
    nbytes: int
    gpu: str


class _Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One storage of the trainer; ``segment`` is -1 for a storage that no copy reads."""

    segment: int
    offset: int
    nbytes: int


class CudaIpcOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the trainer's storages can be mapped from, and where it listens. ``process`` tells the exporter itself."""

    process: str
    segments: tuple[_Segment, ...]
    spans: tuple[_Span, ...]
    is_arena: bool
    address: str
    port: int
    secret: bytes

    __repr__ = repr_without("secret")


class CudaIpcTransport(Transport):
    """GPU memory of one host; pulls."""

    name = "cuda_ipc"
    pulls = True

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
            return (
                "the trainer's allocator (expandable segments or cudaMallocAsync) gives memory that nobody else can map"
            )
        if trainer.gpu == worker.gpu:
            return None
        if trainer.gpu not in worker.visible_gpus:
            return f"the worker cannot see the trainer's GPU {trainer.gpu} (widen CUDA_VISIBLE_DEVICES of the engine)"
        theirs, ours = _index_of(trainer.gpu), _index_of(worker.gpu)
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
        _check_offer(decoded, copies)
        return CudaIpcWorkerEnd(copies, decoded)


def process_identity() -> str:
    """Differs between any two processes of a host, containers included."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{namespace}:{os.getpid()}"


def _index_of(uuid: str) -> int | None:
    """The number of a GPU here, None when it is not visible to this process."""
    uuids = visible_gpus()
    return uuids.index(uuid) if uuid in uuids else None


def _check_offer(offer: CudaIpcOffer, copies: Sequence[Copy]) -> None:
    for span in offer.spans:
        if span.segment >= len(offer.segments) or span.offset < 0 or span.nbytes < 0:
            raise ProtocolError("cuda_ipc offer: a storage lies outside of all allocations")
        if span.segment >= 0 and span.offset + span.nbytes > offer.segments[span.segment].nbytes:
            raise ProtocolError("cuda_ipc offer: a storage reaches past its allocation")
    for segment in offer.segments:
        if len(segment.handle) != driver.HANDLE_NBYTES:
            raise ProtocolError(f"cuda_ipc offer: a handle of {len(segment.handle)} bytes")
    used = {copy.src_storage for copy in copies if copy.nbytes}
    if any(number >= len(offer.spans) or offer.spans[number].segment < 0 for number in used):
        raise ProtocolError("cuda_ipc offer: it lacks a storage of the plan")


def _export(copies: Sequence[Copy], memory: Memory) -> tuple[tuple[_Segment, ...], tuple[_Span, ...]]:
    used = {copy.src_storage for copy in copies if copy.nbytes}
    segments: dict[int, _Segment] = {}
    numbers: dict[int, int] = {}
    spans = []
    for number, storage in enumerate(memory.storages):
        if number not in used:
            spans.append(_Span(segment=-1, offset=0, nbytes=storage.numel()))
            continue
        start, nbytes = driver.allocation_of(storage.data_ptr(), storage.device)
        if start not in segments:
            handle = driver.export_allocation(start, storage.device)
            numbers[start] = len(segments)
            segments[start] = _Segment(handle=handle, address=start, nbytes=nbytes, gpu=gpu_uuid(storage.device))
        offset = storage.data_ptr() - start
        spans.append(_Span(segment=numbers[start], offset=offset, nbytes=storage.numel()))
    return tuple(segments.values()), tuple(spans)


class _Pair:
    """What both ends have: a guard and the connection beside the data."""

    def __init__(self, end: str) -> None:
        self.guard = EndGuard(end)
        self._link: PairLink | None = None

    @contextlib.contextmanager
    def use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure tells the other side at once."""
        with self.guard.use(what, deadline):
            try:
                yield
            except BaseException:
                self._hang_up()
                raise

    def hold(self, link: PairLink) -> None:
        """Keep the connection until the end is closed or fails."""
        self._link = link

    def check(self) -> None:
        """Raise unless both processes live and the pair is connected."""
        if self._link is None:
            raise StateError("a round before connect")
        self._link.check()

    def close(self) -> None:
        self.guard.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()


class CudaIpcTrainerEnd(TrainerEnd):
    """Keeps the memory alive and exported; a round is one wait for the GPU."""

    def __init__(self, copies: Sequence[Copy], memory: Memory, address: str) -> None:
        self._pair = _Pair("the trainer's end of a cuda_ipc pair")
        self._memory = memory
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self._devices = list(dict.fromkeys(memory.storages[copy.src_storage].device for copy in copies))
        segments, spans = _export(copies, memory)
        self._listener = Listener(address, self._pair.guard)
        self._offer = CudaIpcOffer(
            process=process_identity(),
            segments=segments,
            spans=spans,
            is_arena=memory.is_arena,
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
            for device in self._devices:
                wait_device(device, deadline, "the work on the trainer's GPU", self._pair.guard.check)
            return self._nbytes[part]

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._listener.close()
        self._memory = Memory([])


class _Mapping:
    """The trainer's storages as memory of one GPU of this process; ``close`` unmaps them."""

    def __init__(self, offer: CudaIpcOffer, device: torch.device) -> None:
        self.device = device
        self._opened: list[int] = []
        same_process = offer.process == process_identity()
        starts = []
        try:
            for segment in offer.segments:
                _refuse_unreachable(segment.gpu, device)
                if same_process:
                    starts.append(segment.address)
                else:
                    starts.append(driver.open_allocation(segment.handle, device))
                    self._opened.append(starts[-1])
        except BaseException:
            self.close()
            raise
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        storages = [
            nothing
            if span.segment < 0 or not span.nbytes
            else driver.bytes_at(starts[span.segment] + span.offset, span.nbytes, device)
            for span in offer.spans
        ]
        self.memory = Memory(storages, is_arena=offer.is_arena)

    def close(self) -> None:
        while self._opened:
            # After a failed kernel nothing can be unmapped any more; the process has lost its GPU then.
            with contextlib.suppress(TransportError):
                driver.close_allocation(self._opened.pop(), self.device)


def _new_replay(copies: Sequence[Copy], src: Memory, dst: Memory, device: torch.device) -> CudaReplay:
    # Triton comes with torch for CUDA only; without a GPU this module still has to say what it lacks.
    from weightcast.cuda.replay import CudaReplay

    return CudaReplay(copies, src, dst, device)


def _new_proven(
    copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest, device: torch.device
) -> ProvenReplay:
    from weightcast.content.proven_on_gpu import ProvenReplay

    return ProvenReplay(copies, src, dst, manifest, device)


def _refuse_unreachable(uuid: str, device: torch.device) -> None:
    if uuid == gpu_uuid(device):
        return
    index = _index_of(uuid)
    if index is None:
        raise Unsupported(
            f"the trainer's GPU {uuid} is not visible to this worker",
            hint="Widen CUDA_VISIBLE_DEVICES of the engine, or use the nccl transport",
        )
    if not torch.cuda.can_device_access_peer(device.index, index):
        raise Unsupported(f"GPU {device.index} cannot reach the memory of GPU {index}", hint="Use the nccl transport")


class CudaIpcWorkerEnd(WorkerEnd):
    """Maps the trainer's allocations once, then replays the plan out of them."""

    def __init__(self, copies: Sequence[Copy], offer: CudaIpcOffer) -> None:
        self._pair = _Pair("the worker's end of a cuda_ipc pair")
        self._copies = tuple(copies)
        self._parts = parts_of(copies)
        self._offer = offer
        self._mapping: _Mapping | None = None
        self._stream: torch.cuda.Stream | None = None
        self._replays: Recent[CudaReplay] = Recent(parts=len(self._parts))
        self._proven: Recent[ProvenReplay] = Recent(parts=len(self._parts))
        self._devices: Recent[torch.device] = Recent()

    def connect(self, deadline: Deadline) -> None:
        """Map the memory for the current GPU; ``receive`` maps it anew if its memory lies on another."""
        with self._pair.use("connect", deadline):
            offer = self._offer
            link = PairLink.dial_to(offer.address, offer.port, offer.secret, deadline, self._pair.guard)
            self._pair.hold(link)
            try:
                self._map(torch.device("cuda", torch.cuda.current_device()))
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
        mapping = self._mapped_for(memory)
        for part in self._parts:
            if memory.gpu is not None:
                self._replay_for(memory, mapping, part).warm_up()
            else:
                self._proven_for(memory, mapping, manifest, part).warm_up()

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self.has_written = False
        with self._pair.use("receive", deadline):
            mapping = self._mapped_for(memory)
            nbytes = self._run(self._replay_for(memory, mapping, part), mapping, deadline)
            # Bytes of a process that died meanwhile may be anybody's.
            self._pair.check()
            return nbytes

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """A trainer that dies while its bytes are copied is no failure: the digest says whether they are the right ones."""
        self.has_written = False
        with self._pair.use("receive", deadline):
            mapping = self._mapped_for(memory)
            if memory.gpu is not None:
                # What was written to the host's memory is read back over the bus; the digest does that better alone.
                return self.receive(memory, deadline, part), None
            replay = self._proven_for(memory, mapping, manifest, part)
            nbytes = self._run(replay, mapping, deadline)
            with torch.cuda.stream(self._stream):
                return nbytes, replay.total()

    def _replay_for(self, memory: Memory, mapping: _Mapping, part: int) -> CudaReplay:
        copies = self._parts[part]
        return self._replays.get(
            (memory.number, part), lambda: _new_replay(copies, mapping.memory, memory, mapping.device)
        )

    def _proven_for(self, memory: Memory, mapping: _Mapping, manifest: Manifest, part: int) -> ProvenReplay:
        copies = self._parts[part]
        return self._proven.get(
            (memory.number, part), lambda: _new_proven(copies, mapping.memory, memory, manifest, mapping.device)
        )

    def _run(self, replay: CudaReplay | ProvenReplay, mapping: _Mapping, deadline: Deadline) -> int:
        """Queue the copies and wait for them."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(mapping.device))
        done = new_event()
        self.has_written = True
        with torch.cuda.stream(stream):
            nbytes = replay.run()
            done.record(stream)
        wait_event(done, deadline, "the copy out of the trainer's GPU memory", self._pair.guard.check)
        return nbytes

    def abort(self) -> None:
        self._pair.guard.abort()

    def close(self) -> None:
        self._pair.close()
        self._unmap()

    def _mapped_for(self, memory: Memory) -> _Mapping:
        """The trainer's memory for the GPU that ``memory`` lies on; raises unless both processes live."""
        self._pair.check()
        return self._map(self._devices.get(memory.number, lambda: self._device_of(memory)))

    def _device_of(self, memory: Memory) -> torch.device:
        if memory.gpu is not None:
            return memory.gpu
        devices = {memory.storages[number].device for number in {copy.dst_storage for copy in self._copies}}
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            raise InvalidInput(f"cuda_ipc receives into the memory of one GPU, not {sorted(map(str, devices))}")
        return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())

    def _map(self, device: torch.device) -> _Mapping:
        if self._mapping is None or self._stream is None or self._mapping.device != device:
            self._unmap()
            self._mapping, self._stream = _Mapping(self._offer, device), new_stream(device)
        return self._mapping

    def _unmap(self) -> None:
        mapping, stream = self._mapping, self._stream
        self._mapping = self._stream = None
        if mapping is None or stream is None:
            return
        try:
            # Copies of an aborted round may still be running; memory under a running copy must stay mapped.
            wait_queued(stream, Deadline(DRAIN_S), "the last copy")
        except (WeightcastError, RuntimeError) as error:
            logger.warning("the trainer's GPU memory stays mapped: %s", error)
        else:
            mapping.close()
        self._replays.clear()
        self._proven.clear()
