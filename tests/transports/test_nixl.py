"""nixl: the suite over TCP and over whatever UCX finds here, and what only nixl does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch

from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    NotShared,
    PeerLost,
    PlanMismatch,
    ProtocolError,
    TransportError,
    Unsupported,
    WeightcastError,
)
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.sources import StreamSource
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import TransportCase, bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide
from weightcast.testing.transport_suite import TransportSuite
from weightcast.trainer.publisher import Publisher
from weightcast.transports import TransportRegistry
from weightcast.transports.nixl_agent import Extent
from weightcast.transports.registry import registry

pytest.importorskip("nixl_cu13", reason="needs NIXL: pip install 'weightcast[nixl]'")

from weightcast.transports.nixl import MAX_METADATA_NBYTES, NixlOffer, NixlTransport, NixlWorkerEnd

NIXL = "weightcast.transports.nixl:NixlTransport"
NBYTES = 256 * 2**20
BUCKET_NBYTES = 2**20


class TestOverSharedMemory(TransportSuite):
    """What UCX finds between two processes of one host."""

    transport = NIXL
    meets = True
    bucket_sizes = (256, 2**20)


class TestOverTcp(TransportSuite):
    transport = NIXL
    meets = True
    bucket_sizes = (8192,)

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def only_tcp(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UCX_TLS", "tcp")
            yield


@pytest.fixture
def only_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


@contextmanager
def _pair(trainer: Peer, case: TransportCase) -> Iterator[tuple[WorkerSide, NixlWorkerEnd]]:
    """A connected pair: the worker here, the trainer in its process."""
    offer = trainer.call("open", NIXL, "cpu", case.copies, case.src_nbytes, BUCKET_NBYTES)
    worker = WorkerSide()
    worker.open(NIXL, "cpu", offer, case.copies)
    worker.make(0, case.dst_nbytes)
    assert isinstance(worker.end, NixlWorkerEnd)
    try:
        trainer.start("connect")
        worker.connect()
        trainer.result()
        yield worker, worker.end
    finally:
        worker.close()


@contextmanager
def _in_the_middle(end: NixlWorkerEnd, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` once the first bucket of a receive has landed."""

    over = threading.Event()

    def watch() -> None:
        while not (end._readers and end._readers[0].has_written):
            if over.wait(0.0002):
                return
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _landed(worker: WorkerSide) -> torch.Tensor:
    return worker._memories[0].storages[0]


@pytest.mark.usefixtures("only_tcp")
def test_a_trainer_that_is_stopped_in_the_middle_ends_by_the_deadline_and_writes_no_weight_afterwards() -> None:
    """Its answers are on their way: they come when it goes on, into buckets that were kept for them."""
    case, values = bulk_case(NBYTES), os.urandom(NBYTES)
    with Peer(TrainerSide, rank=0) as trainer, _pair(trainer, case) as (worker, end):
        trainer.call("write", [values])
        trainer.call("send")
        unfinished = end._unfinished
        with _in_the_middle(end, trainer.freeze), pytest.raises(DeadlineExceeded):
            worker.receive(0, 4.0)
        assert end.has_written
        torn = _landed(worker).clone()
        got = torn.numpy().tobytes()
        edge = next(i for i in range(0, NBYTES, BUCKET_NBYTES) if got[i : i + 64] != values[i : i + 64])
        assert 0 < edge < NBYTES
        assert got[:edge] == values[:edge]
        assert not torn[edge:].any()
        worker_memory = worker._memories[0]
        worker.close()
        assert len(unfinished) == 1
        os.kill(trainer.pid, signal.SIGCONT)
        ended = Deadline(20)
        while not _is_swept(unfinished):
            ended.check("the reads that were in flight")
            time.sleep(0.01)
        assert torch.equal(worker_memory.storages[0], torn)


def _is_swept(unfinished: object) -> bool:
    unfinished.sweep()  # type: ignore[attr-defined]
    return len(unfinished) == 0  # type: ignore[arg-type]


@pytest.mark.usefixtures("only_tcp")
def test_a_trainer_killed_in_the_middle_is_peer_lost_at_once() -> None:
    case = bulk_case(NBYTES)
    with Peer(TrainerSide, rank=0) as trainer, _pair(trainer, case) as (worker, end):
        trainer.call("send")
        with _in_the_middle(end, trainer.kill), pytest.raises(PeerLost):
            worker.receive(0, 60.0)
        with pytest.raises(TransportError):
            worker.receive(0, 30.0)


@pytest.mark.usefixtures("only_tcp")
def test_abort_ends_a_read_that_is_not_answered() -> None:
    case = bulk_case(NBYTES)
    with Peer(TrainerSide, rank=0) as trainer, _pair(trainer, case) as (worker, _):
        trainer.call("send")
        trainer.freeze()
        worker.abort_after(0.2)
        with pytest.raises(TransportError, match="aborted"):
            worker.receive(0, 60.0)
        assert not worker.end.has_written
        os.kill(trainer.pid, signal.SIGCONT)


def _trainer_of(transport: NixlTransport, case: TransportCase) -> tuple[Memory, torch.Tensor]:
    values = torch.randint(0, 256, (case.src_nbytes[0],), dtype=torch.uint8)
    return transport.adopt(Memory([values])), values


def _connect(trainer: object, worker: object) -> None:
    thread = threading.Thread(target=trainer.connect, args=(Deadline(20),))  # type: ignore[attr-defined]
    thread.start()
    worker.connect(Deadline(20))  # type: ignore[attr-defined]
    thread.join()


def test_memory_is_registered_once_for_all_workers_and_until_it_is_released() -> None:
    case, transport = bulk_case(5000), NixlTransport()
    memory, values = _trainer_of(transport, case)
    agents = set()
    for _ in range(2):  # two epochs
        ends = [transport.trainer_end(case.copies, memory) for _ in range(3)]
        workers = [transport.worker_end(end.offer(), case.copies) for end in ends]
        for end, worker in zip(ends, workers, strict=True):
            agents.add(msgspec.msgpack.decode(end.offer(), type=NixlOffer).agent)
            _connect(end, worker)
        for _ in range(2):
            values.copy_(torch.randint(0, 256, (5000,), dtype=torch.uint8))
            for end, worker in zip(ends, workers, strict=True):
                end.send(Deadline(20))
                target = Memory([torch.zeros(5000, dtype=torch.uint8)])
                assert worker.receive(target, Deadline(20)) == 5000
                assert torch.equal(target.storages[0], values)
        for each in (*workers, *ends):
            each.close()
    assert len(agents) == 1
    assert len(transport._exposures._exposed) == 1
    transport.release(memory)
    transport.release(memory)
    assert not transport._exposures._exposed


def test_memory_that_another_transport_moved_is_registered_where_it_lies_and_given_up_with_its_last_pair() -> None:
    case, transport = bulk_case(5000), NixlTransport()
    before, _ = _trainer_of(transport, case)
    moved = Memory([torch.randint(0, 256, (5000,), dtype=torch.uint8)])
    end = transport.trainer_end(case.copies, moved)
    end.close()
    end.close()
    transport.release(before)
    assert not transport._exposures._exposed


def test_a_worker_that_read_what_was_not_there_yet_is_told_apart_by_its_receipts() -> None:
    case, transport = bulk_case(5000), NixlTransport()
    memory, _ = _trainer_of(transport, case)
    end = transport.trainer_end(case.copies, memory)
    worker = transport.worker_end(end.offer(), case.copies)
    _connect(end, worker)
    target = Memory([torch.zeros(5000, dtype=torch.uint8)])
    end.send(Deadline(20))
    worker.receive(target, Deadline(20))
    worker.receive(target, Deadline(20))
    come = Deadline(20)
    with pytest.raises(ProtocolError, match="before they were there"):  # noqa: PT012 - the receipts come when they come
        while True:
            come.check("the second receipt")
            if end._exposed is not None and end._exposed.receipts(end._pair) == 2:
                end.send(Deadline(20))
    for each in (worker, end):
        each.close()
    transport.release(memory)


# ---- publish()


@pytest.fixture
def registered() -> None:
    """By hand where the installed package is older than the entry point."""
    if "nixl" not in registry().names():
        registry().register("nixl", NixlTransport)


SHAPES = {"a.weight": (64, 256), "b.weight": (700, 96), "c.bias": (33,), "d.scale": ()}


class Weights(torch.nn.Module):
    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            module, _, parameter = name.partition(".")
            self.add_module(module, torch.nn.Module())
            getattr(self, module).register_parameter(parameter, torch.nn.Parameter(value))


def _fresh() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["module", "stream"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_rounds_of_modules_and_streams_reach_two_workers(mode: str, kind: str) -> None:
    """One of them has half of the rows, and both another type than the trainer; in the third round the publisher connects anew."""
    landed = {name: value.bfloat16() for name, value in _fresh().items()}
    workers = [
        DictModel(landed, relocatable=mode == "staged"),
        DictModel(landed, rows=(1, 2), relocatable=mode == "staged"),
    ]
    engine = LocalEngine("e", workers, side_by_side=True)
    values = _fresh()
    source: object = StreamSource(lambda: list(values.items()), window_nbytes=2**17)
    if kind == "module":
        source = Weights(values)
    try:
        with Publisher(source, [engine], transport="nixl", mode=mode, timeout_s=60) as publisher:  # type: ignore[arg-type]
            for number in range(3):
                with torch.no_grad():
                    for name, value in _fresh().items():
                        (source.get_parameter(name) if isinstance(source, Weights) else values[name]).copy_(value)
                        values[name] = value
                if number == 2:
                    publisher.connect()
                report = publisher.publish()
                assert report.digests_match
                assert {worker.transport for worker in report.engines[0].workers} == {"nixl"}
                for model, (rank, size) in zip(workers, ((0, 1), (1, 2)), strict=True):
                    for name, live in model.parameters().items():
                        wanted = values[name].bfloat16()
                        if size > 1 and wanted.dim() and wanted.shape[0] % size == 0:
                            wanted = wanted.chunk(size)[rank]
                        assert torch.equal(live, wanted), (name, number)
    finally:
        engine.close()


# ---- offers


def _offer(**changes: object) -> NixlOffer:
    case, transport = bulk_case(1024), NixlTransport()
    memory, _ = _trainer_of(transport, case)
    end = transport.trainer_end(case.copies, memory)
    offer = msgspec.msgpack.decode(end.offer(), type=NixlOffer)
    end.close()
    transport.release(memory)
    return msgspec.structs.replace(offer, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"metadata": b"x" * (MAX_METADATA_NBYTES + 1)}, ProtocolError, "malformed"),
        ({"agent": "n" * 100}, ProtocolError, "malformed"),
        ({"device": "tpu"}, ProtocolError, "malformed"),
        ({"bucket_nbytes": 2**40}, ProtocolError, "malformed"),
        ({"extents": ()}, ProtocolError, "outside of storage 0"),
        ({"extents": (Extent(4096, 1023, 0),)}, ProtocolError, "outside of storage 0"),
        ({"extents": (Extent(-4096, 1024, 0),)}, ProtocolError, "outside of all memory"),
        ({"extents": (Extent(2**64 - 512, 1024, 0),)}, ProtocolError, "malformed|outside of all memory"),
        ({"plan": "0" * 64}, PlanMismatch, "different copies"),
    ],
)
def test_offers_that_ask_for_too_much_are_refused(
    changes: dict[str, object], error: type[WeightcastError], said: str
) -> None:
    offer = msgspec.msgpack.encode(_offer(**changes))
    with pytest.raises(error, match=said):
        NixlTransport().worker_end(offer, bulk_case(1024).copies)


def test_metadata_of_another_agent_or_of_none_is_passed_over_by_name() -> None:
    """The pair is there, and NIXL is of no use to it: another transport may be."""
    case, transport = bulk_case(1024), NixlTransport()
    memory, _ = _trainer_of(transport, case)
    for changes in ({"agent": "somebody"}, {"metadata": b""}, {"metadata": os.urandom(300)}):
        end = transport.trainer_end(case.copies, memory)
        offer = msgspec.structs.replace(msgspec.msgpack.decode(end.offer(), type=NixlOffer), **changes)
        worker = transport.worker_end(msgspec.msgpack.encode(offer), case.copies)
        thread = threading.Thread(target=end.connect, args=(Deadline(20),))
        thread.start()
        with pytest.raises(NotShared, match="NIXL does not reach the trainer"):
            worker.connect(Deadline(20))
        thread.join()
        worker.close()
        end.close()
    transport.release(memory)


def test_what_an_offer_shows_has_no_secret_in_it() -> None:
    offer = _offer()
    shown = repr(offer)
    assert repr(offer.secret) not in shown
    assert repr(offer.metadata) not in shown


# ---- the choice


def _facts(**changes: object) -> Facts:
    known = ("cuda_ipc", "shm", "nixl", "tcp")
    return msgspec.structs.replace(Facts(host="h", pid=1, device="cpu", transports=known), **changes)


@pytest.fixture
def found() -> TransportRegistry:
    from weightcast.transports.shm import ShmTransport
    from weightcast.transports.tcp import TcpTransport

    found = TransportRegistry(points=[])
    for transport in (ShmTransport, NixlTransport, TcpTransport):
        found.register(transport.name, transport)
    return found


def test_it_is_taken_by_itself_where_both_sides_have_rdma_and_nothing_is_nearer(found: TransportRegistry) -> None:
    near, far = _facts(rdma=True), _facts(rdma=True, host="i", pid=2)
    assert found.choose(near, far)[1] == "nixl (shm: other host, container or user)"
    assert found.choose(near, near)[1] == "shm (first choice)"
    for device in ("cpu", "cuda"):
        assert found.choose(_facts(rdma=True, device="cuda"), _facts(rdma=True, device=device))[0].name == "nixl"
    for trainer, worker in ((near, _facts(host="i")), (_facts(), far)):
        assert found.choose(trainer, worker)[1] == "tcp (shm: other host, container or user)"
        assert found.choose(trainer, worker, "nixl")[1] == "nixl (asked for)"
    assert found.choose(near, far, unusable={"nixl": "no way"})[1].endswith("nixl: no way)")


def test_without_nixl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    with pytest.raises(Unsupported, match=r"NIXL cannot be loaded.*weightcast\[nixl\]"):
        NixlTransport()
