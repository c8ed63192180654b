"""vLLM's native ``nccl`` backend, engine side: trainers written for vLLM can drive an engine of weightcast unchanged.

Every wait has a deadline, which vLLM's own has not. Weights go through the engine's loader while they arrive, so a transfer
that fails in the middle leaves the engine dirty until the next one succeeds: this wire has no staging, no digest and no way back.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence

import torch

from weightcast.cuda.nccl import Communicator
from weightcast.cuda.wait import new_event
from weightcast.deadline import Deadline
from weightcast.digest.versions import INITIAL_VERSION
from weightcast.errors import InvalidInput, PlanMismatch, StateError, Unsupported, WeightcastError
from weightcast.manifest import TensorSpec
from weightcast.manifest.dtypes import dtype_of
from weightcast.manifest.names import number_of, shown
from weightcast.receiver.base import LiveModel
from weightcast.vllm_protocol.nccl.wire import (
    DEFAULT_BUFFER_NBYTES,
    DEFAULT_NUM_BUFFERS,
    UNIQUE_ID_NBYTES,
    Chunk,
    chunks_of,
    fetch_unique_id,
    single_chunks,
)
from weightcast.weight_transfer.base import InitInfo, UpdateInfo, WeightTransferEngine, WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig

TIMEOUT_S = 300.0
"""How long joining, and one update, may take; vLLM's clients wait as long."""


class VllmNcclInitInfo(InitInfo, kw_only=True, forbid_unknown_fields=True):
    """Where to meet: a TCPStore at ``master_address:master_port``, or the id itself in standard base64."""

    world_size: int
    rank_offset: int = 1
    master_address: str = ""
    master_port: int = 0
    nccl_unique_id_b64: str | None = None
    packed: bool = False
    packed_buffer_size_bytes: int = DEFAULT_BUFFER_NBYTES
    packed_num_buffers: int = DEFAULT_NUM_BUFFERS

    def __post_init__(self) -> None:
        if self.world_size < 2 or not 1 <= self.rank_offset < self.world_size:
            raise InvalidInput(f"rank_offset {self.rank_offset} in a world of {self.world_size}", field="rank_offset")
        if self.nccl_unique_id_b64 is None and not (self.master_address and 0 < self.master_port < 65536):
            raise InvalidInput("master_address and master_port, or nccl_unique_id_b64", field="master_address")
        if self.packed_buffer_size_bytes <= 0:
            raise InvalidInput("packed_buffer_size_bytes is positive", field="packed_buffer_size_bytes")
        self.unique_id()

    def unique_id(self) -> bytes | None:
        """The id when it came with the message."""
        if self.nccl_unique_id_b64 is None:
            return None
        try:
            unique_id = base64.b64decode(self.nccl_unique_id_b64, validate=True)
        except binascii.Error as error:
            raise InvalidInput(f"not base64: {error}", field="nccl_unique_id_b64") from None
        if len(unique_id) != UNIQUE_ID_NBYTES:
            raise InvalidInput(f"an NCCL id has {UNIQUE_ID_NBYTES} bytes", field="nccl_unique_id_b64")
        return unique_id


class VllmNcclUpdateInfo(UpdateInfo, kw_only=True, forbid_unknown_fields=True):
    """The tensors that follow, in order. All lists empty: those of the last update. ``packed...`` overrides init_info."""

    names: tuple[str, ...] = ()
    dtype_names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    packed: bool | None = None
    packed_buffer_size_bytes: int | None = None
    packed_num_buffers: int | None = None

    def __post_init__(self) -> None:
        for field in ("dtype_names", "shapes"):
            if len(getattr(self, field)) != len(self.names):
                raise InvalidInput(f"{len(self.names)} names, {len(getattr(self, field))} {field}", field=field)
        self.specs()

    def specs(self) -> tuple[TensorSpec, ...]:
        lists = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in lists)


class VllmNcclEngine(WeightTransferEngine[VllmNcclInitInfo, VllmNcclUpdateInfo]):
    """One worker of an NCCL group whose rank 0 is the trainer."""

    init_info_cls = VllmNcclInitInfo
    update_info_cls = VllmNcclUpdateInfo

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        if device.type != "cuda":
            raise Unsupported(
                f"the nccl backend needs a GPU, the model is on {device}",
                hint='Use the "weightcast" backend, which works on a CPU, too',
            )

    def __init__(self, config: WeightTransferConfig, model: LiveModel, worker: WorkerRank) -> None:
        super().__init__(config, model, worker)
        self.check_device(model.device)
        self._init_info: VllmNcclInitInfo | None = None
        self._comm: Communicator | None = None
        self._specs: tuple[TensorSpec, ...] = ()
        self._version = INITIAL_VERSION
        self._open = False
        self._dirty = False
        self._failed = False

    def init_transfer_engine(self, init_info: VllmNcclInitInfo) -> None:
        rank = init_info.rank_offset + self.worker.rank
        if rank >= init_info.world_size:
            raise InvalidInput(f"rank {rank} in a world of {init_info.world_size}", field="world_size")
        self.shutdown()  # an update that the former trainer left open is closed with that
        deadline = Deadline(TIMEOUT_S)
        unique_id = init_info.unique_id()
        if unique_id is None:
            unique_id = fetch_unique_id(init_info.master_address, init_info.master_port, init_info.world_size, deadline)
        comm = Communicator(self.model.device)
        comm.connect(unique_id, rank, init_info.world_size, deadline)
        # Named: memory that is freed under a running collective belongs to somebody else.
        probe = torch.zeros(1, dtype=torch.float32, device=self.model.device)
        comm.all_reduce(probe, deadline)
        comm.finish(deadline, "the first all-reduce")
        self._comm, self._init_info = comm, init_info

    def start_weight_update(self) -> None:
        if self._comm is None:
            raise StateError("no trainer is connected", hint="Call init_weight_transfer_engine first")
        if self._open:
            raise StateError("a weight update is open already", hint="Call finish_weight_update first")
        # Weights of no version stay that until an update has arrived as a whole.
        self._open, self._failed = True, self._dirty

    def update_weights(self, update_info: VllmNcclUpdateInfo) -> None:
        if not self._open or self._comm is None or self._init_info is None:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        specs = update_info.specs() or self._specs
        if not specs:
            raise InvalidInput("no tensors, and no update before this one to repeat", field="names")
        arrivals = _Arrivals(self._comm, self._chunks(update_info, specs), Deadline(TIMEOUT_S))
        lost = self.model.unknown([spec.name for spec in specs])
        if lost:
            self._open = False
            arrivals.drain()  # the trainer sends all of it, and would wait for whoever does not receive
            raise PlanMismatch(
                f"the engine has no place for {len(lost)} of {number_of(len(specs), 'tensor')}: {shown(lost)}"
            )
        self._dirty = self._failed = True
        try:
            self.model.load_weights(iter(arrivals))
            arrivals.drain()
        except WeightcastError as error:
            self._open = False
            # The loader wraps what its input raises; the transfer's own error says more.
            raise arrivals.error or error from None
        except BaseException:
            self._open = False
            raise
        self._specs, self._failed = specs, False

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self._open:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        self._open = False
        self._dirty = self._failed
        self._version = weight_version or self._version

    def shutdown(self) -> None:
        self._open = False
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    @property
    def weight_version(self) -> str:
        return self._version

    @property
    def dirty(self) -> bool:
        return self._dirty

    def _chunks(self, update_info: VllmNcclUpdateInfo, specs: Sequence[TensorSpec]) -> Iterator[Chunk]:
        assert self._init_info is not None
        packed = self._init_info.packed if update_info.packed is None else update_info.packed
        buffer_nbytes = update_info.packed_buffer_size_bytes or self._init_info.packed_buffer_size_bytes
        return chunks_of(specs, buffer_nbytes) if packed else single_chunks(specs)


_Arrival = tuple[Chunk, torch.Tensor, torch.cuda.Event]
"""A chunk, the buffer it travels in, and when it is there."""


class _Arrivals:
    """Named tensors as they arrive: while one chunk is loaded, the next is on its way."""

    def __init__(self, comm: Communicator, chunks: Iterator[Chunk], deadline: Deadline) -> None:
        self._comm = comm
        self._chunks = chunks
        self._deadline = deadline
        self._next: _Arrival | None = None
        self._begun = False
        self.error: WeightcastError | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            if not self._begun:
                self._begun, self._next = True, self._receive()
            while self._next is not None:
                chunk, buffer, arrived = self._next
                self._next = self._receive()
                self._comm.wait(arrived, self._deadline, "receiving weights")
                for spec, offset in zip(chunk.specs, chunk.offsets, strict=True):
                    yield spec.name, _tensor(buffer, spec, offset)
        except WeightcastError as error:
            self.error = error
            raise

    def drain(self) -> None:
        """Receive what the loader did not ask for: the trainer sends all of it."""
        for _ in self:
            pass

    def _receive(self) -> _Arrival | None:
        chunk = next(self._chunks, None)
        if chunk is None:
            return None
        # A buffer of its own per chunk: a loader may keep tensors until it has all parts of a parameter.
        buffer = torch.empty(chunk.nbytes, dtype=torch.uint8, device=self._comm.device)
        buffer.record_stream(self._comm.stream)
        self._comm.stream.wait_stream(torch.cuda.current_stream(self._comm.device))
        if chunk.nbytes:
            self._comm.broadcast(buffer, 0, self._deadline)
        arrived = new_event()
        arrived.record(self._comm.stream)
        return chunk, buffer, arrived


def _tensor(buffer: torch.Tensor, spec: TensorSpec, offset: int) -> torch.Tensor:
    part = buffer[offset : offset + spec.nbytes]
    dtype = dtype_of(spec.dtype)
    if offset % dtype.itemsize:
        # Tensors of smaller elements before it shifted it; a view needs its own alignment.
        part = part.clone()
    return part.view(dtype).view(spec.shape)
