"""cuda_ipc and nccl: the suite, with all processes on one GPU, and what only they do."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_sides import GpuTrainerSide, GpuWorkerSide
from gpu_suite import GpuSidesSuite

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, GroupBroken, InvalidInput, PeerLost
from weightcast.testing.ranks import Peer, RankFailed
from weightcast.testing.transport_cases import CASES, TransportCase, bulk_case
from weightcast.testing.transport_sides import TrainerSide
from weightcast.transports.base import TrainerEnd

pytest.importorskip("triton", reason="needs a CUDA build of torch")

NBYTES = 16 * 2**20


class GpuSuite(GpuSidesSuite):
    device = "cuda"


class TestCudaIpc(GpuSuite):
    transport = "weightcast.transports.cuda_ipc:CudaIpcTransport"
    bucket_sizes = (8192,)

    def test_a_trainer_killed_in_the_middle_is_peer_lost_or_harmless(self, trainer: Peer, worker: Peer) -> None:
        """Killed between rounds: the round fails by name, nothing else is harmed, and a new trainer takes over."""
        case = bulk_case(NBYTES)
        connect(self.transport, trainer, worker, case)
        trainer.kill()
        assert failure(worker, "receive", 0, 10.0) == "PeerLost"
        assert failure(worker, "receive", 0, 10.0) == "TransportError"
        worker.call("close")
        assert worker.call("multiply", 1) < 1e-9
        with Peer(GpuTrainerSide, rank=0) as second:
            connect(self.transport, second, worker, case)
            values = random.randbytes(NBYTES)
            second.call("write", [values])
            second.call("send")
            assert worker.call("receive") == NBYTES
            assert worker.call("read") == [values]

    def test_a_trainer_killed_during_a_copy_leaves_cuda_usable(self, trainer: Peer, worker: Peer) -> None:
        case = bulk_case(4 * 2**30)
        connect(self.transport, trainer, worker, case)
        trainer.call("send")
        worker.call("receive")
        for _ in range(20):
            worker.start("receive", 0)
        time.sleep(random.uniform(0.001, 0.02))
        trainer.kill()
        kinds = set()
        for _ in range(20):
            try:
                worker.result()
            except RankFailed as error:
                kinds.add(error.kind)
        assert kinds <= {"PeerLost", "TransportError"}
        worker.call("close")
        assert worker.call("multiply", 2) < 1e-9

    @pytest.mark.parametrize("trainer_is_killed", [False, True])
    def test_nothing_stays_mapped_after_close(self, trainer: Peer, worker: Peer, trainer_is_killed: bool) -> None:
        """A mapping would keep the memory from the GPU for as long as this worker lives, whatever its trainer frees."""
        nbytes = 512 * 2**20
        connect(self.transport, trainer, worker, bulk_case(nbytes))
        trainer.call("send")
        assert worker.call("receive") == nbytes
        mapped = worker.call("mapped")
        assert len(mapped) == 1
        assert worker.call("allocation_nbytes", mapped[0]) >= nbytes
        if trainer_is_killed:
            trainer.kill()
        worker.call("close")
        assert worker.call("allocation_nbytes", mapped[0]) == 0
        if not trainer_is_killed:
            before, after = trainer.call("let_go")
            assert before >= nbytes
            assert after <= before - nbytes

    def test_two_pairs_map_the_same_memory_at_once(self, worker: Peer) -> None:
        case, values = bulk_case(NBYTES), random.randbytes(NBYTES)
        with trainer_here(self.transport, case) as trainer:
            second = trainer.transport.trainer_end(case.copies, trainer.memory)
            try:
                with Peer(GpuWorkerSide) as other:
                    for peer, end in ((worker, trainer.end), (other, second)):
                        peer.call("open", self.transport, "cuda", end.offer(), case.copies)
                        peer.call("make", 0, case.dst_nbytes)
                        peer.start("connect")
                        end.connect(Deadline(20.0))
                        peer.result()
                    trainer.write([values])
                    for peer, end in ((worker, trainer.end), (other, second)):
                        end.send(Deadline(20.0))
                        peer.call("receive")
                        assert peer.call("read") == [values]
            finally:
                second.close()

    def test_a_process_may_pull_from_itself(self) -> None:
        case, values = bulk_case(NBYTES), random.randbytes(NBYTES)
        with trainer_here(self.transport, case) as trainer:
            worker = GpuWorkerSide()
            worker.open(self.transport, "cuda", trainer.end.offer(), case.copies)
            worker.make(0, case.dst_nbytes)
            thread = threading.Thread(target=worker.connect)
            thread.start()
            trainer.connect()
            thread.join()
            trainer.write([values])
            trainer.send()
            worker.receive()
            assert worker.read() == [values]
            worker.close()

    @pytest.mark.parametrize("name", ["strided", "dtypes", "bulk"])
    def test_memory_of_expandable_segments_is_mapped(self, worker: Peer, name: str) -> None:
        """Small storages share pages, a large one has many; what a worker has mapped goes with the pair, and with a killed worker."""
        seed = random.SystemRandom().getrandbits(32)
        case = bulk_case(48 * 2**20) if name == "bulk" else CASES[name](random.Random(seed))
        generator = torch.Generator().manual_seed(seed)
        with environment("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"), Peer(GpuTrainerSide) as trainer:
            for peer in (worker, None):
                with contextlib.nullcontext(peer) if peer else Peer(GpuWorkerSide) as receiver:
                    assert receiver is not None
                    connect(self.transport, trainer, receiver, case)
                    for _ in range(3):
                        values, canary = case.new_values(generator), case.new_canary(generator)
                        receiver.call("fill", 0, [storage.numpy().tobytes() for storage in canary])
                        trainer.call("write", [storage.numpy().tobytes() for storage in values])
                        trainer.call("send")
                        receiver.call("receive")
                        assert receiver.call("read") == case.expected(values, canary), f"{seed=}"
                    if peer is None:
                        receiver.kill()
                    else:
                        receiver.call("close")
                before, after = trainer.call("let_go")
                assert after <= before - (48 * 2**20 if name == "bulk" else 0)

    def test_cuda_malloc_async_is_refused_by_name(self) -> None:
        with environment("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync"), Peer(GpuTrainerSide) as trainer:
            case = bulk_case(NBYTES)
            with pytest.raises(RankFailed, match="cudaMallocAsync") as caught:
                trainer.call("open", self.transport, "cuda", case.copies, case.src_nbytes, 2**20)
            assert caught.value.kind == "Unsupported"

    def test_the_trainers_connect_ends_at_its_deadline(self) -> None:
        with trainer_here(self.transport, bulk_case(1024)) as trainer:
            start = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                trainer.connect(0.3)
            assert time.monotonic() - start < 1.3

    def test_a_dead_worker_is_peer_lost_for_the_trainer(self, worker: Peer) -> None:
        case = bulk_case(NBYTES)
        with trainer_here(self.transport, case) as trainer:
            worker.call("open", self.transport, "cuda", trainer.end.offer(), case.copies)
            worker.start("connect")
            trainer.connect()
            worker.result()
            worker.kill()
            with pytest.raises(PeerLost):
                trainer.send()


class TestNccl(GpuSuite):
    transport = "weightcast.transports.nccl:NcclTransport"

    def test_nothing_is_left_of_a_peer_that_was_killed(self, trainer: Peer, worker: Peer) -> None:
        """As in the suite, but NCCL closes the sockets of an aborted communicator in the background."""
        case = bulk_case(2**20)
        self._cycle(trainer, worker, case)
        trainer.call("close")
        worker.call("close")
        clean = worker.call("census")
        self._cycle(trainer, worker, case)
        trainer.kill()
        assert failure(worker, "receive", 0, 10.0) == "PeerLost"
        worker.call("close")
        limit = Deadline(5.0)
        while worker.call("census") != clean:
            limit.check("leaving nothing behind")
            time.sleep(0.1)

    def test_two_workers_of_one_trainer_at_once(self, worker: Peer) -> None:
        """Three ranks on one GPU: two pairs, whose rounds overlap."""
        case, values = bulk_case(NBYTES), random.randbytes(NBYTES)
        with trainer_here(self.transport, case) as trainer, Peer(GpuWorkerSide) as other:
            second = trainer.transport.trainer_end(case.copies, trainer.memory, bucket_nbytes=2**20)
            try:
                for peer, end in ((worker, trainer.end), (other, second)):
                    peer.call("open", self.transport, "cuda", end.offer(), case.copies)
                    peer.call("make", 0, case.dst_nbytes)
                    peer.start("connect")
                    end.connect(Deadline(20.0))
                    peer.result()
                trainer.write([values])
                with ThreadPoolExecutor(2) as pool:
                    worker.start("receive")
                    other.start("receive")
                    sent = [pool.submit(end.send, Deadline(20.0)) for end in (trainer.end, second)]
                    assert [future.result() for future in sent] == [NBYTES, NBYTES]
                for peer in (worker, other):
                    assert peer.result() == NBYTES
                    assert peer.call("read") == [values]
            finally:
                second.close()

    @pytest.mark.parametrize("name", ["strided", "casts", "published", "dtypes"])
    def test_a_group_of_two_workers(self, worker: Peer, name: str) -> None:
        """Three ranks on one GPU: each worker finds all bytes, round after round, whatever was there before."""
        seed = random.SystemRandom().getrandbits(32)
        case, generator = CASES[name](random.Random(seed)), torch.Generator().manual_seed(seed)
        with trainer_here(self.transport, case) as trainer, Peer(GpuWorkerSide) as other:
            workers = [worker, other]
            with group_of(trainer, workers, case, 4096) as ends, ThreadPoolExecutor(2) as pool:
                for _ in range(3):
                    values = case.new_values(generator)
                    trainer.write([storage.numpy().tobytes() for storage in values])
                    canaries = [case.new_canary(generator) for _ in workers]
                    for peer, canary in zip(workers, canaries, strict=True):
                        peer.call("fill", 0, [storage.numpy().tobytes() for storage in canary])
                        peer.start("receive")
                    list(pool.map(lambda end: end.send(Deadline(20.0)), ends))
                    for peer, canary in zip(workers, canaries, strict=True):
                        assert peer.result() == sum(copy.nbytes for copy in case.copies)
                        assert peer.call("read") == case.expected(values, canary), f"{seed=}"

    def test_a_worker_of_a_group_that_does_not_come_is_named(self, worker: Peer) -> None:
        case = bulk_case(NBYTES)
        with (
            trainer_here(self.transport, case) as trainer,
            Peer(GpuWorkerSide) as other,
            group_of(trainer, [worker, other], case, 2**20) as ends,
            ThreadPoolExecutor(2) as pool,
        ):
            worker.start("receive")
            sent = [pool.submit(end.send, Deadline(1.0)) for end in ends]
            with pytest.raises(GroupBroken):
                sent[0].result()
            with pytest.raises(DeadlineExceeded, match="did not receive in time"):
                sent[1].result()
            with pytest.raises(RankFailed) as caught:
                worker.result()
            assert caught.value.kind == "PeerLost"

    def test_a_worker_killed_in_a_group_is_named_and_the_other_one_goes_on_with_a_new_trainer_end(
        self, worker: Peer
    ) -> None:
        case = bulk_case(256 * 2**20)
        with trainer_here(self.transport, case) as trainer, Peer(GpuWorkerSide) as other:
            with group_of(trainer, [worker, other], case, 2**20) as ends, ThreadPoolExecutor(2) as pool:
                for peer in (worker, other):
                    peer.start("receive")
                sent = [pool.submit(end.send, Deadline(20.0)) for end in ends]
                time.sleep(random.uniform(0.0, 0.05))
                other.kill()
                with pytest.raises(GroupBroken, match="the worker is gone"):
                    sent[0].result()
                with pytest.raises(PeerLost, match="the worker is gone"):
                    sent[1].result()
                with pytest.raises(RankFailed) as caught:
                    worker.result()
                assert caught.value.kind == "PeerLost"
            worker.call("close")
            assert worker.call("multiply", 4) < 1e-9
            values = os.urandom(case.src_nbytes[0])
            trainer.write([values])
            with group_of(trainer, [worker], case, 2**20) as (end,):
                worker.start("receive")
                end.send(Deadline(20.0))
                worker.result()
                assert worker.call("read") == [values]

    def test_cuda_works_after_the_peer_was_killed_in_a_bucket(self, trainer: Peer, worker: Peer) -> None:
        case = bulk_case(256 * 2**20)
        connect(self.transport, trainer, worker, case)
        worker.start("receive")
        trainer.start("send")
        time.sleep(random.uniform(0.0, 0.05))
        trainer.kill()
        with pytest.raises(RankFailed) as caught:
            worker.result()
        assert caught.value.kind == "PeerLost"
        worker.call("close")
        assert worker.call("multiply", 3) < 1e-9
        with Peer(GpuTrainerSide, rank=0) as second:
            connect(self.transport, second, worker, case)
            worker.start("receive")
            second.call("send")
            assert worker.result() == 256 * 2**20

    def test_memory_of_the_cpu_is_refused(self) -> None:
        case = bulk_case(1024)
        with pytest.raises(InvalidInput, match="GPU memory only"):
            TrainerSide().open(self.transport, "cpu", case.copies, case.src_nbytes, 2**20)


def connect(spec: str, trainer: Peer, worker: Peer, case: TransportCase) -> None:
    offer = trainer.call("open", spec, "cuda", case.copies, case.src_nbytes, 2**20)
    worker.call("open", spec, "cuda", offer, case.copies)
    worker.call("make", 0, case.dst_nbytes)
    worker.start("connect")
    trainer.call("connect")
    worker.result()


@contextlib.contextmanager
def group_of(
    trainer: TrainerSide, workers: Sequence[Peer], case: TransportCase, bucket_nbytes: int
) -> Iterator[list[TrainerEnd]]:
    """The trainer's ends of one connected group."""
    transport = trainer.transport
    ends = transport.trainer_ends(len(workers), case.copies, trainer.memory, bucket_nbytes=bucket_nbytes)
    try:
        for peer, end in zip(workers, ends, strict=True):
            peer.call("open", "weightcast.transports.nccl:NcclTransport", "cuda", end.offer(), case.copies)
            peer.call("make", 0, case.dst_nbytes)
            peer.start("connect")
        with ThreadPoolExecutor(len(ends)) as pool:
            list(pool.map(lambda end: end.connect(Deadline(20.0)), ends))
        for peer in workers:
            peer.result()
        yield ends
    finally:
        for end in ends:
            end.close()


@contextlib.contextmanager
def trainer_here(spec: str, case: TransportCase) -> Iterator[TrainerSide]:
    trainer = TrainerSide()
    trainer.open(spec, "cuda", case.copies, case.src_nbytes, 2**20)
    try:
        yield trainer
    finally:
        trainer.close()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def failure(peer: Peer, method: str, *args: object) -> str:
    with pytest.raises(RankFailed) as caught:
        peer.call(method, *args)
    return caught.value.kind
