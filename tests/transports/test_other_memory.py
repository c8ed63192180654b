"""Weights in memory that neither sockets nor files reach: what tcp and shm_cuda do then, on a device that a CPU stands in for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from weightcast.cuda import host
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, NotShared, StateError, TransportError
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import FileSpan, Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy, compile_plan, parts_of
from weightcast.plan.replay import Replay
from weightcast.testing.transport_cases import CASES, TransportCase
from weightcast.testing.transport_sides import TrainerSide, WorkerSide
from weightcast.transports import file_buckets, shm_cuda, tcp_ends
from weightcast.transports.gpu_pull import Reached
from weightcast.transports.movers import HostMover, Mover
from weightcast.transports.shm_cuda import ShmCudaTransport


class FarMover(HostMover):
    """As on a GPU, nothing but copies through buffers reaches the weights."""

    reaches_weights = False


class FarPull:
    """GpuPull with the processor in the place of a GPU."""

    def __init__(
        self,
        copies: Sequence[Copy],
        reach: Callable[[torch.device, Deadline], Reached],
        check: Callable[[], None],
        what: str,
    ) -> None:
        self._copies, self._reach = copies, reach
        self._reached: Reached | None = None
        self.has_written = False

    def connect(self, deadline: Deadline) -> None:
        self._reached = self._reach(torch.device("cpu"), deadline)

    def receive(self, memory: Memory, deadline: Deadline, part: int) -> int:
        assert self._reached is not None
        self.has_written = True
        return Replay(parts_of(self._copies)[part], self._reached.memory, memory).run()

    def close(self) -> None:
        if self._reached is not None:
            self._reached.close()
        self._reached = None


class Registrations:
    """What was registered with the stand-in for CUDA, by address."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.failure: TransportError | None = None

    def register_host(self, address: int, nbytes: int, device: torch.device) -> None:
        if self.failure is not None and self.now:
            raise self.failure
        self.now[address] = nbytes

    def unregister_host(self, address: int, device: torch.device) -> None:
        del self.now[address]


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> Registrations:
    """A CUDA that registers and copies with the processor."""
    made = Registrations()
    monkeypatch.setattr(host.driver, "register_host", made.register_host)
    monkeypatch.setattr(host.driver, "unregister_host", made.unregister_host)
    monkeypatch.setattr(host.driver, "bytes_at", _bytes_at)
    monkeypatch.setattr(shm_cuda, "GpuPull", FarPull)
    monkeypatch.setattr(file_buckets, "mover_for", _far)
    return made


def _bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _far(memory: Memory, copies: Sequence[Copy], check: Callable[[], None], *, is_source: bool) -> Mover:
    return FarMover()


def _rounds(transport: str, case: TransportCase, seed: int, bucket_nbytes: int) -> None:
    """Three rounds of fresh values between two sides in this process; every byte of the destination is compared."""
    generator, nbytes = torch.Generator().manual_seed(seed), sum(copy.nbytes for copy in case.copies)
    trainer, worker = TrainerSide(), WorkerSide()
    offer = trainer.open(transport, "cpu", case.copies, case.src_nbytes, bucket_nbytes)
    worker.open(transport, "cpu", offer, case.copies)
    with ThreadPoolExecutor(1) as pool:
        try:
            connected = pool.submit(worker.connect)
            trainer.connect()
            connected.result(20)
            for number in range(3):
                values, canary = case.new_values(generator), case.new_canary(generator)
                worker.fill(number % 2, [storage.numpy().tobytes() for storage in canary])
                trainer.write([storage.numpy().tobytes() for storage in values])
                sent = pool.submit(trainer.send)
                assert worker.receive(number % 2) == nbytes
                sent.result(20)
                assert worker.read(number % 2) == case.expected(values, canary), f"{seed=}, round {number}"
        finally:
            worker.close()
            trainer.close()


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("far", ["trainer", "worker", "both"])
def test_tcp_brings_all_bytes_through_buffers(name: str, far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(memory: Memory, copies: Sequence[Copy], check: Callable[[], None], *, is_source: bool) -> Mover:
        return FarMover() if far in ("both", "trainer" if is_source else "worker") else HostMover()

    monkeypatch.setattr(tcp_ends, "mover_for", chosen)
    seed = random.SystemRandom().getrandbits(32)
    _rounds("tcp", CASES[name](random.Random(seed)), seed, 2**20 if name == "published" else 8192)


@pytest.mark.parametrize("name", list(CASES))
def test_shm_cuda_copies_out_of_the_registered_arena(name: str, registrations: Registrations) -> None:
    seed = random.SystemRandom().getrandbits(32)
    case = CASES[name](random.Random(seed))
    _rounds("weightcast.transports.shm_cuda:ShmCudaTransport", case, seed, 8192)
    assert not registrations.now, "it was unregistered"


def test_the_arena_is_registered_in_whole_pages_a_piece_at_a_time_and_given_back_where_that_fails(
    registrations: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "REGISTERED_AT_ONCE_NBYTES", 8192)
    memory = torch.empty(3 * 8192 - 100, dtype=torch.uint8)
    made = host.RegisteredHost(memory, torch.device("cpu"), Deadline(5))
    start = memory.data_ptr()
    assert registrations.now == {start: 8192, start + 8192: 8192, start + 16384: 8192}
    assert (made.bytes.data_ptr(), made.bytes.numel()) == (start, memory.numel())
    made.close()
    made.close()
    assert registrations.now == {}
    registrations.failure = TransportError("no more pages")
    with pytest.raises(TransportError, match="no more pages"):
        host.RegisteredHost(memory, torch.device("cpu"), Deadline(5))
    assert registrations.now == {}
    late = Deadline(0.001)
    while not late.passed:
        pass
    with pytest.raises(DeadlineExceeded):
        host.RegisteredHost(memory, torch.device("cpu"), late)


def test_memory_that_cannot_be_registered_is_not_shared(
    registrations: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next best transport is taken, and the report says why."""

    def refused(address: int, nbytes: int, device: torch.device) -> None:
        raise TransportError("CUDA error 304: OS call failed")

    monkeypatch.setattr(host.driver, "register_host", refused)
    case = CASES["large"](random.Random(1))
    trainer, worker = TrainerSide(), WorkerSide()
    name = "weightcast.transports.shm_cuda:ShmCudaTransport"
    worker.open(name, "cpu", trainer.open(name, "cpu", case.copies, case.src_nbytes, 8192), case.copies)
    with pytest.raises(NotShared, match="cannot register the trainer's shared memory: CUDA error 304"):
        worker.connect()
    worker.close()
    trainer.close()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Manifest, Layout, bytes]:
    """A safetensors file below the root of an engine, its tensors, and where they lie behind the header."""
    monkeypatch.setenv("WEIGHTCAST_CHECKPOINT_ROOT", str(tmp_path))
    specs = [
        TensorSpec(name=f"w{i}", dtype=dtype, shape=shape)
        for i, (dtype, shape) in enumerate(
            [("bfloat16", (70, 33)), ("float32", (41, 9)), ("bfloat16", (5,)), ("float32", (2, 3, 7))]
        )
    ]
    manifest = Manifest.of(specs)
    header, placements, end = {}, [], 0
    for spec in sorted(manifest.tensors, key=lambda spec: spec.dtype != "float32"):
        kind = {"bfloat16": "BF16", "float32": "F32"}[spec.dtype]
        header[spec.name] = {"dtype": kind, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        itemsize = 2 if kind == "BF16" else 4
        placements.append(
            Placement(
                region=Region.whole(spec),
                dtype=spec.dtype,
                storage=0,
                offset=end // itemsize,
                strides=contiguous_strides(spec.shape),
            )
        )
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = random.randbytes(end)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path, manifest, Layout(placements=tuple(placements), storage_nbytes=(end,)), values


def test_files_are_read_into_buckets_and_copied_from_there(
    checkpoint: tuple[Path, Manifest, Layout, bytes], registrations: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several buckets a lane, a row-parallel slice, and a landing whose order of dimensions is another one."""
    monkeypatch.setattr(file_buckets, "BUCKET_NBYTES", 512)
    path, manifest, held, values = checkpoint
    wanted = Layout(
        placements=(
            Placement(
                region=Region(name="w0", offsets=(0, 3), sizes=(70, 20)),
                dtype="bfloat16",
                storage=0,
                offset=0,
                strides=(20, 1),
            ),
            Placement(
                region=Region.whole(manifest["w1"]), dtype="float32", storage=1, offset=5, strides=(1, 41)
            ),
            Placement(region=Region.whole(manifest["w3"]), dtype="float32", storage=1, offset=400, strides=(21, 7, 1)),
        ),
        storage_nbytes=(2800, 4 * 450),
    )  # fmt: skip
    copies = compile_plan(manifest, {0: held}, wanted)[0]
    case = TransportCase(copies=copies, src_nbytes=held.storage_nbytes, dst_nbytes=wanted.storage_nbytes)
    transport = ShmCudaTransport()
    storage = torch.frombuffer(bytearray(values), dtype=torch.uint8)
    start = path.stat().st_size - len(values)
    memory = transport.adopt(Memory([storage], files=[FileSpan(str(path), start)]))
    trainer = transport.trainer_end(copies, memory)
    worker = transport.worker_end(trainer.offer(), copies)
    try:
        with pytest.raises(TransportError, match="not connected"):
            transport.worker_end(trainer.offer(), copies).receive(
                Memory([torch.zeros(9, dtype=torch.uint8)]), Deadline(5)
            )
        worker.connect(Deadline(5))
        assert not registrations.now, "there is no arena"
        generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(32))
        for _ in range(2):
            canary = case.new_canary(generator)
            target = Memory([each.clone() for each in canary])
            nbytes, digest = worker.receive_proven(target, manifest, Deadline(5))
            assert (nbytes, digest) == (sum(copy.nbytes for copy in copies), None)
            found = [each.numpy().tobytes() for each in target.storages]
            assert found == case.expected([storage], canary)
        path.write_bytes(b"another file")
        with pytest.raises(TransportError, match="changed since it was offered"):
            worker.receive(target, Deadline(5))
        with pytest.raises(TransportError, match="is dead"):
            worker.receive(target, Deadline(5))
    finally:
        worker.close()
        trainer.close()


def test_what_was_not_adopted_or_lies_on_a_gpu_is_refused() -> None:
    memory = Memory([torch.zeros(8, dtype=torch.uint8, device="meta")])
    with pytest.raises(InvalidInput, match="CPU memory only"):
        ShmCudaTransport().adopt(memory)
    with pytest.raises(StateError, match="not adopted"):
        ShmCudaTransport().trainer_end((), Memory([torch.zeros(8, dtype=torch.uint8)]))
