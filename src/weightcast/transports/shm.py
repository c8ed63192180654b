"""shm: the worker copies straight out of the trainer's memory, which lies in one nameless shared arena; same host only.

Weights that are parts of safetensors files are not moved: the worker reads the files themselves. As the trainer takes no part in
``receive``, a trainer that dies after ``connect`` does not stop it: what is mapped stays valid, and noticing the death is
the control channel's business. ``connect`` to a dead trainer is PeerLost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
import torch

from weightcast.content.proven_on_cpu import ProvenReplay
from weightcast.cpu import kernels_for
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, ProtocolError, StateError, TransportError
from weightcast.layout.memory import FileSpan, Memory
from weightcast.manifest import Manifest, align
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, as_run, nbytes_of, parts_of, slices
from weightcast.plan.replay import Replay
from weightcast.transports.arena import Arena, ArenaRef, map_arena
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES, Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.files import FileRef, OpenFile, compile_reads, file_ref, outside
from weightcast.transports.guard import EndGuard
from weightcast.transports.recent import Recent
from weightcast.transports.window_pipes import PipesRef, WindowPipes
from weightcast.untrusted.known import known

SLICE_NBYTES = 64 * 2**20
"""A receive looks at its deadline and for an abort after each slice: 10 to 30 ms on one core."""


class _Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One storage of the trainer: part of the arena, or, with ``file``, part of a file."""

    offset: int = 0
    nbytes: int
    file: FileRef | None = None


class ShmOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where each storage of the trainer can be read. ``gaps_are_zero`` is explained in Memory.is_arena. ``pipes`` tell of the windows of
    a stream."""

    arena: ArenaRef | None
    spans: tuple[_Span, ...]
    gaps_are_zero: bool
    pipes: PipesRef | None = None


class ShmMemory(Memory):
    """A trainer's memory whose storages lie in one arena, or are parts of files."""

    def __init__(
        self,
        storages: Sequence[torch.Tensor],
        arena: Arena | None,
        offsets: Sequence[int],
        files: Sequence[FileSpan | None],
        is_arena: bool,
    ) -> None:
        super().__init__(storages, is_arena=is_arena, files=files)
        self.arena = arena
        self.offsets = tuple(offsets)

    def offer(self) -> ShmOffer:
        spans = tuple(
            _Span(offset=offset, nbytes=storage.numel(), file=None if file is None else _file_ref(file, storage))
            for offset, storage, file in zip(self.offsets, self.storages, self.files, strict=True)
        )
        return ShmOffer(arena=self.arena.ref if self.arena else None, spans=spans, gaps_are_zero=self.is_arena)


class ShmTransport(Transport):
    """CPU memory of one host. The worker pulls."""

    name = "shm"
    pulls = True
    preference = 80
    has_pipes = True
    """Whether both ends tell of windows through pipes."""

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        return (trainer.device, worker.device) == ("cpu", "cpu")

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        if trainer.host != worker.host:
            return "other host, container or user"
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device != "cpu":
                return f"the {side}'s weights are on {facts.device}, shm moves CPU memory"
        folder = outside(trainer.folders, worker.roots)
        if folder is not None:
            return f"the engine opens no files in {folder} (--checkpoint-root)"
        return None

    def adopt(self, memory: Memory) -> Memory:
        """Copy all storages into one arena, except for those of files. The old storages can be dropped afterwards. Storages that are
        one memory stay one memory."""
        if isinstance(memory, ShmMemory):
            return memory
        if any(storage.device.type != "cpu" for storage in memory.storages):
            raise InvalidInput("shm moves CPU memory only", field="device")
        offsets, end = [], 0
        places: dict[tuple[int, int], int] = {}
        for storage, file in zip(memory.storages, memory.files, strict=True):
            place = (storage.data_ptr(), storage.numel())
            offsets.append(places.get(place, end) if file is None else end)
            if file is None and place not in places:
                places[place] = end
                end = align(end + storage.numel())
        if end == 0:
            return ShmMemory(memory.storages, None, offsets, memory.files, memory.is_arena)
        arena = Arena(end)
        storages, copied = [], set[int]()
        for storage, file, offset in zip(memory.storages, memory.files, offsets, strict=True):
            if file is not None:
                storages.append(storage)
                continue
            moved = arena.bytes[offset : offset + storage.numel()]
            if storage.numel() and offset not in copied:
                moved.copy_(storage)
                copied.add(offset)
            storages.append(moved)
        return ShmMemory(storages, arena, offsets, memory.files, memory.is_arena)

    def release(self, memory: Memory) -> None:
        if isinstance(memory, ShmMemory) and memory.arena is not None:
            memory.arena.close()

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        if not isinstance(memory, ShmMemory):
            raise StateError("this memory was not adopted by shm")
        return ShmTrainerEnd(copies, memory, has_pipes=self.has_pipes)

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(ShmOffer))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"malformed shm offer: {error}") from None
        check_offer(decoded, copies)
        return ShmWorkerEnd(copies, decoded)


class ShmTrainerEnd(TrainerEnd):
    """Only says where the memory is. What the trainer writes there, workers see."""

    def __init__(self, copies: Sequence[Copy], memory: ShmMemory, *, has_pipes: bool) -> None:
        self._guard = EndGuard("the trainer's end of a shm pair")
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        offer = memory.offer()
        if has_pipes and len(self._nbytes) > 1:
            self.pipes, ref = WindowPipes.make()
            offer = msgspec.structs.replace(offer, pipes=ref)
        self._offer = msgspec.msgpack.encode(offer)

    def offer(self) -> bytes:
        return self._offer

    def connect(self, deadline: Deadline) -> None:
        """Return at once: the worker connects to the memory, not to the process."""
        with self._guard.use("connect", deadline):
            pass

    def send(self, deadline: Deadline, part: int = 0) -> int:
        with self._guard.use("send", deadline):
            return self._nbytes[part]

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        if self.pipes is not None:
            self.pipes.close()


class _Step(Protocol):
    def run(self) -> int: ...


class ShmWorkerEnd(WorkerEnd):
    """Maps the arena and opens the files once, and then replays the plan in each round."""

    def __init__(self, copies: Sequence[Copy], offer: ShmOffer) -> None:
        self._guard = EndGuard("the worker's end of a shm pair")
        self._offer = offer
        self._copies = copies
        self._parts = parts_of(copies)
        self._nbytes = nbytes_of(copies)
        self._source: Memory | None = None
        self._files: list[OpenFile | None] = []
        self._steps: Recent[list[_Step]] = Recent(parts=len(self._parts))
        self._proven: Recent[ProvenReplay] = Recent(parts=len(self._parts))

    def connect(self, deadline: Deadline) -> None:
        with self._guard.use("connect", deadline):
            arena = self._offer.arena
            storage = torch.empty(0, dtype=torch.uint8, device="cpu") if arena is None else map_arena(arena)
            gaps_are_zero = self._offer.gaps_are_zero or storages_are_filled(self._copies, self._offer.spans)
            self._source = Memory([storage], is_arena=gaps_are_zero)
            if self._offer.pipes is not None:
                self.pipes = WindowPipes.open(self._offer.pipes)
            for span in self._offer.spans:
                self._files.append(None if span.file is None else OpenFile(span.file))
            for copy in self._copies:
                file = self._files[copy.src_storage]
                if file is not None:
                    file.check_copy(copy)
            kernels_for(self._nbytes)  # loaded here, and not in a round

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:
        """Compile the replay into this memory. TransportError when the end is dead or not connected."""
        self._guard.check()
        source = self._connected()
        for part in self._parts:
            if self._proves():
                self._proven_for(source, memory, manifest, part)
            else:
                self._steps_for(source, memory, part)

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self.has_written = False
        with self._guard.use("receive", deadline):
            source = self._connected()
            for file in self._files:
                if file is not None:
                    file.check()
            for step in self._steps_for(source, memory, part):
                self._guard.check()
                deadline.check("receiving through shared memory")
                self.has_written = True
                step.run()
            return nbytes_of(self._parts[part])

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """Copy and digest in one pass, where one pass is worth it and all bytes come out of the arena."""
        if not self._proves():
            return super().receive_proven(memory, manifest, deadline, part)

        self.has_written = False

        def check() -> None:
            self._guard.check()
            deadline.check("receiving through shared memory")
            self.has_written = True  # what follows a check that passed is a copy

        with self._guard.use("receive", deadline):
            replay = self._proven_for(self._connected(), memory, manifest, part)
            return nbytes_of(self._parts[part]), replay.run(check)

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        self._steps.clear()
        self._proven.clear()
        self._source = None
        if self.pipes is not None:
            self.pipes.close()
        for file in self._files:
            if file is not None:
                file.close()
        self._files = []

    def _connected(self) -> Memory:
        if self._source is None:
            raise TransportError("the pair is not connected", hint="Call connect() first")
        return self._source

    def _proves(self) -> bool:
        """Whether bytes are copied and digested in one pass: where that is worth it and all of them come out of the arena."""
        return kernels_for(self._nbytes) is not None and all(file is None for file in self._files)

    def _proven_for(self, source: Memory, memory: Memory, manifest: Manifest, part: int) -> ProvenReplay:
        kernels = kernels_for(self._nbytes)
        assert kernels is not None

        def compiled() -> ProvenReplay:
            copies = [in_arena(copy, self._offer.spans) for copy in self._parts[part]]
            return ProvenReplay(copies, source, memory, manifest, kernels)

        return self._proven.get((memory.number, part), compiled)

    def _steps_for(self, source: Memory, memory: Memory, part: int) -> list[_Step]:
        return self._steps.get((memory.number, part), lambda: self._compiled(source, memory, self._parts[part]))

    def _compiled(self, source: Memory, memory: Memory, copies: Sequence[Copy]) -> list[_Step]:
        spans = self._offer.spans
        direct = [in_arena(copy, spans) for copy in copies if spans[copy.src_storage].file is None]
        in_files = [copy for copy in copies if spans[copy.src_storage].file is not None]
        steps: list[_Step] = [Replay(part, source, memory) for part in slices(direct, SLICE_NBYTES)]
        return steps + list(compile_reads(in_files, self._files, memory, SLICE_NBYTES))


def _file_ref(file: FileSpan, storage: torch.Tensor) -> FileRef:
    return file_ref(file.path, file.offset, storage.numel())


def check_offer(offer: ShmOffer, copies: Iterable[Copy]) -> None:
    """Raise ProtocolError where a copy would read outside of what the trainer offers."""
    limit = 0 if offer.arena is None else offer.arena.nbytes
    for number, span in enumerate(offer.spans):
        end = span.file.nbytes if span.file else limit - span.offset
        if span.offset < 0 or not 0 <= span.nbytes <= end or span.offset % itemsize_of("float64"):
            raise ProtocolError(f"shm offer: storage {number} lies outside of the shared memory")
    for copy in copies:
        if copy.src_storage >= len(offer.spans) or _end_nbytes(copy) > offer.spans[copy.src_storage].nbytes:
            raise ProtocolError(f"shm offer: {copy.region.name} lies outside of storage {copy.src_storage}")


def _end_nbytes(copy: Copy) -> int:
    if copy.region.numel == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(copy.sizes, copy.src_strides, strict=True))
    return (copy.src_offset + last + 1) * itemsize_of(copy.src_dtype)


def in_arena(copy: Copy, spans: Sequence[_Span]) -> Copy:
    """Return the copy with its source counted from the start of the arena, so that storages that lie side by side can be merged."""
    base = spans[copy.src_storage].offset // itemsize_of(copy.src_dtype)
    return msgspec.structs.replace(copy, src_storage=0, src_offset=base + copy.src_offset)


def storages_are_filled(copies: Iterable[Copy], spans: Sequence[_Span]) -> bool:
    """True when a copy reads every byte of every storage. All gaps between copies are the arena's own zeros then."""
    runs = [as_run(copy) for copy in copies]
    filled = [0] * len(spans)
    for run in sorted((run for run in runs if run is not None), key=lambda run: run.src_offset):
        if run.src_offset <= filled[run.src_storage]:
            filled[run.src_storage] = max(filled[run.src_storage], run.src_offset + run.nbytes)
    used = {run.src_storage for run in runs if run is not None}
    return all(filled[number] == spans[number].nbytes for number in used)
