"""shm_cuda: a GPU copies straight out of a trainer's host memory, which lies in one nameless shared arena; same host only.

The trainer's side is that of shm. The worker maps the arena, registers the mapping with CUDA once, and its GPU replays the plan over the
bus: nothing is copied by the host. Weights that are parts of safetensors files are read into page-locked buckets instead, some buckets
being read while the GPU empties others.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from weightcast.cuda.host import RegisteredHost
from weightcast.deadline import Deadline
from weightcast.errors import NotShared, PeerLost, ProtocolError, TransportError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.arena import map_arena
from weightcast.transports.base import Facts, WorkerEnd
from weightcast.transports.file_buckets import FileBuckets
from weightcast.transports.files import OpenFile, outside
from weightcast.transports.gpu_pull import GpuPull
from weightcast.transports.guard import EndGuard
from weightcast.transports.shm import ShmOffer, ShmTransport, check_offer, in_arena, storages_are_filled
from weightcast.untrusted.known import known

WARM_UP_S = 60.0
"""Of registering memory anew for another GPU than ``connect`` found; ``connect`` has done it as a rule."""


class ShmCudaTransport(ShmTransport):
    """Host memory of one host, copied by a GPU of that host; pulls."""

    name = "shm_cuda"
    preference = 70
    has_pipes = False

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        return (trainer.device, worker.device) == ("cpu", "cuda")

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        if trainer.host != worker.host:
            return "other host, container or user"
        if (trainer.device, worker.device) != ("cpu", "cuda"):
            return f"it copies from host memory to a GPU, not from {trainer.device} to {worker.device}"
        folder = outside(trainer.folders, worker.roots)
        if folder is not None:
            return f"the engine opens no files in {folder} (--checkpoint-root)"
        return None

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(ShmOffer))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"malformed shm_cuda offer: {error}") from None
        check_offer(decoded, copies)
        return ShmCudaWorkerEnd(copies, decoded)


class _RegisteredArena:
    """The trainer's arena as one GPU reaches it."""

    def __init__(self, arena: torch.Tensor, device: torch.device, deadline: Deadline, *, is_arena: bool) -> None:
        self._registered = RegisteredHost(arena, device, deadline)
        self.memory = Memory([self._registered.bytes], is_arena=is_arena)

    def close(self) -> None:
        self._registered.close()


class ShmCudaWorkerEnd(WorkerEnd):
    """Maps and registers the arena and opens the files once, then replays."""

    def __init__(self, copies: Sequence[Copy], offer: ShmOffer) -> None:
        self._guard = EndGuard("the worker's end of a shm_cuda pair")
        self._offer = offer
        self._copies = tuple(copies)
        self._nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        spans = offer.spans
        direct = [in_arena(copy, spans) for copy in copies if spans[copy.src_storage].file is None]
        self._has_direct = {part: bool(nbytes_of(some)) for part, some in parts_of(direct).items()}
        self._pull = GpuPull(direct, self._reach, self._guard.check, "the copy out of the trainer's shared memory")
        self._arena: torch.Tensor | None = None
        self._files: list[OpenFile | None] = []
        self._from_files: FileBuckets | None = None
        self._is_connected = False

    def connect(self, deadline: Deadline) -> None:
        """Map the memory and register it for the current GPU, which takes about a second for ten gigabytes."""
        with self._guard.use("connect", deadline):
            if self._offer.arena is not None:
                self._arena = map_arena(self._offer.arena)
                try:
                    self._pull.connect(deadline)
                except TransportError as error:
                    if isinstance(error, PeerLost):
                        raise
                    raise NotShared(f"cannot register the trainer's shared memory: {error.message}") from error
            for span in self._offer.spans:
                self._files.append(None if span.file is None else OpenFile(span.file))
            in_files = [copy for copy in self._copies if self._files[copy.src_storage] is not None]
            for copy in in_files:
                file = self._files[copy.src_storage]
                assert file is not None
                file.check_copy(copy)
            if in_files:
                self._from_files = FileBuckets(in_files, self._files, self._guard.check)
            self._is_connected = True

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:
        self._check_connected()
        if self._offer.arena is not None and self._from_files is None:
            self._pull.warm_up(memory, manifest, Deadline(WARM_UP_S))

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self.has_written = False
        with self._guard.use("receive", deadline):
            self._check_connected()
            for file in self._files:
                if file is not None:
                    file.check()
            if self._has_direct.get(part):
                try:
                    self._pull.receive(memory, deadline, part)
                finally:
                    self.has_written = self._pull.has_written
            if self._from_files is not None:
                self.has_written = True
                self._from_files.receive(memory, deadline, part)
            return self._nbytes[part]

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """Copies and digests in one pass where all bytes come out of the arena."""
        if self._from_files is not None or not self._has_direct.get(part):
            return super().receive_proven(memory, manifest, deadline, part)
        self.has_written = False
        with self._guard.use("receive", deadline):
            self._check_connected()
            try:
                return self._pull.receive_proven(memory, manifest, deadline, part)
            finally:
                self.has_written = self._pull.has_written

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        self._pull.close()
        self._arena = None
        if self._from_files is not None:
            self._from_files.close()
            self._from_files = None
        for file in self._files:
            if file is not None:
                file.close()
        self._files = []

    def _check_connected(self) -> None:
        self._guard.check()
        if not self._is_connected:
            raise TransportError("the pair is not connected", hint="Call connect() first")

    def _reach(self, device: torch.device, deadline: Deadline) -> _RegisteredArena:
        assert self._arena is not None
        gaps_are_zero = self._offer.gaps_are_zero or storages_are_filled(self._copies, self._offer.spans)
        return _RegisteredArena(self._arena, device, deadline, is_arena=gaps_are_zero)


__all__ = ["ShmCudaTransport", "ShmCudaWorkerEnd"]
