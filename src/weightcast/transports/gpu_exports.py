"""GPU memory named for other processes: the allocations that a trainer's storages lie in, as handles, and their mapping in a worker.

Ordinary memory has one handle for each allocation of the driver, whatever lies in it. Memory of expandable segments has a handle of
torch's for each storage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import msgspec
import torch

from weightcast.cuda import driver
from weightcast.cuda.expandable import SharedByTorch, SharedRange, open_shared
from weightcast.errors import ProtocolError, TransportError, Unsupported
from weightcast.layout.memory import Memory
from weightcast.plan import Copy
from weightcast.transports.facts import gpu_uuid, visible_gpus

MOST_HANDLE_NBYTES = 2**20
"""Of torch's: it lists the pages of a storage, eight bytes for two megabytes or more."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One allocation of the trainer. ``address`` is where the trainer itself sees it. With a ``counter``, where torch counts who uses
    it, ``handle`` is one of torch's, and the allocation begins ``handle_offset`` behind what the handle names."""

    handle: bytes
    address: int
    nbytes: int
    gpu: str
    handle_offset: int = 0
    counter: bytes = b""
    counter_offset: int = 0


class Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One storage of the trainer; ``segment`` is -1 for a storage that no copy reads."""

    segment: int
    offset: int
    nbytes: int


def check_exports(segments: Sequence[Segment], spans: Sequence[Span], copies: Sequence[Copy]) -> None:
    """Raise ProtocolError where a storage lies outside of what is named, or the plan needs one that is not."""
    for span in spans:
        if span.segment >= len(segments) or span.offset < 0 or span.nbytes < 0:
            raise ProtocolError("cuda_ipc offer: a storage lies outside of all allocations")
        if span.segment >= 0 and span.offset + span.nbytes > segments[span.segment].nbytes:
            raise ProtocolError("cuda_ipc offer: a storage reaches past its allocation")
    for segment in segments:
        sizes = range(1, MOST_HANDLE_NBYTES) if segment.counter else (driver.HANDLE_NBYTES,)
        if len(segment.handle) not in sizes or min(segment.handle_offset, segment.counter_offset) < 0:
            raise ProtocolError(f"cuda_ipc offer: a handle of {len(segment.handle)} bytes")
    used = {copy.src_storage for copy in copies if copy.nbytes}
    if any(number >= len(spans) or spans[number].segment < 0 for number in used):
        raise ProtocolError("cuda_ipc offer: it lacks a storage of the plan")


class Exports:
    """The trainer's storages that some copies read, as ``segments`` and ``spans``. The caller keeps the memory alive."""

    def __init__(self, copies: Sequence[Copy], memory: Memory) -> None:
        self._segments: list[Segment] = []
        self._numbers: dict[int, int] = {}
        self._shared: list[SharedByTorch] = []
        used = {copy.src_storage for copy in copies if copy.nbytes}
        spans = [Span(segment=-1, offset=0, nbytes=storage.numel()) for storage in memory.storages]
        try:
            for device in {memory.storages[number].device for number in used}:
                numbers = [number for number in sorted(used) if memory.storages[number].device == device]
                uuid, addresses = gpu_uuid(device), [memory.storages[number].data_ptr() for number in numbers]
                for number, found in zip(numbers, driver.allocations_of(addresses, device), strict=True):
                    spans[number] = self._export(memory.storages[number], found, uuid)
        except BaseException:
            self.close()
            raise
        self.segments, self.spans = tuple(self._segments), tuple(spans)

    def close(self) -> None:
        """Idempotent."""
        while self._shared:
            self._shared.pop().close()

    def _export(self, storage: torch.Tensor, found: tuple[int, int] | None, uuid: str) -> Span:
        """The storage as a part of the allocation that was found; None where torch has to name it."""
        address, nbytes = storage.data_ptr(), storage.numel()
        start, whole_nbytes = (address, nbytes) if found is None else found
        if start not in self._numbers:
            if found is None:
                self._share(storage, uuid)
            else:
                handle = driver.export_allocation(start, storage.device)
                self._add(start, handle=handle, address=start, nbytes=whole_nbytes, gpu=uuid)
        return Span(segment=self._numbers[start], offset=address - start, nbytes=nbytes)

    def _share(self, storage: torch.Tensor, uuid: str) -> None:
        address, nbytes = storage.data_ptr(), storage.numel()
        shared = SharedByTorch(address, nbytes, storage.device)
        self._shared.append(shared)
        handle, offset, counter, counter_offset = shared.range
        self._add(
            address,
            handle=handle,
            address=address,
            nbytes=nbytes,
            gpu=uuid,
            handle_offset=offset,
            counter=counter,
            counter_offset=counter_offset,
        )

    def _add(self, start: int, **fields: object) -> None:
        self._numbers[start] = len(self._segments)
        self._segments.append(Segment(**fields))  # type: ignore[arg-type]


class Mapping:
    """The trainer's storages as memory of one GPU of this process; ``close`` unmaps them."""

    def __init__(self, offered: MappingOffer, device: torch.device) -> None:
        self.device = device
        self._opened: list[int] = []
        self._shared: list[torch.UntypedStorage] = []
        same_process = offered.process == process_identity()
        for uuid in {segment.gpu for segment in offered.segments}:
            _refuse_unreachable(uuid, device)
        try:
            starts = [segment.address if same_process else self._open(segment) for segment in offered.segments]
        except BaseException:
            self.close()
            raise
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        storages = [
            nothing
            if span.segment < 0 or not span.nbytes
            else driver.bytes_at(starts[span.segment] + span.offset, span.nbytes, device)
            for span in offered.spans
        ]
        self.memory = Memory(storages, is_arena=offered.is_arena)

    def _open(self, segment: Segment) -> int:
        if segment.counter:
            shared = SharedRange(segment.handle, segment.handle_offset, segment.counter, segment.counter_offset)
            self._shared.append(open_shared(shared, segment.nbytes, self.device))
            return self._shared[-1].data_ptr()
        self._opened.append(driver.open_allocation(segment.handle, self.device))
        return self._opened[-1]

    def close(self) -> None:
        """Idempotent."""
        self._shared.clear()
        while self._opened:
            # After a failed kernel nothing can be unmapped any more; the process has lost its GPU then.
            with contextlib.suppress(TransportError):
                driver.close_allocation(self._opened.pop(), self.device)


class MappingOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker maps. ``process`` tells the exporter itself."""

    process: str
    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    is_arena: bool


def process_identity() -> str:
    """Differs between any two processes of a host, containers included."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{namespace}:{os.getpid()}"


def index_of(uuid: str) -> int | None:
    """The number of a GPU here, None when it is not visible to this process."""
    uuids = visible_gpus()
    return uuids.index(uuid) if uuid in uuids else None


def _refuse_unreachable(uuid: str, device: torch.device) -> None:
    if uuid == gpu_uuid(device):
        return
    index = index_of(uuid)
    if index is None:
        raise Unsupported(
            f"the trainer's GPU {uuid} is not visible to this worker",
            hint="Widen CUDA_VISIBLE_DEVICES of the engine, or use the nccl transport",
        )
    if not torch.cuda.can_device_access_peer(device.index, index):
        raise Unsupported(f"GPU {device.index} cannot reach the memory of GPU {index}", hint="Use the nccl transport")
