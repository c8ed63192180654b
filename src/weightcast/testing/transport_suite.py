"""The conformance suite of transports: every transport must pass it.

One line gives a transport the suite (the name is a registered one or "module:Class"):

    class TestMine(TransportSuite):
        transport = "mine"

``device`` is where both sides' weights lie, ``worker_device`` where the worker's do if that is another one. Tests run the worker, the trainer or both in processes of their own; one side is
in the test's own process where that can be. Bytes are random and compared exactly.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, ProtocolError, TransportError
from weightcast.layout.memory import Memory
from weightcast.testing.ranks import Peer, RankFailed
from weightcast.testing.transport_cases import CASES, TransportCase, arena_case, bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide, load_transport

PROMPTLY_S = 2.0
"""A passed deadline, an abort and a dead peer are noticed within this."""

BULK_NBYTES = 48 * 2**20
SMALL_BUCKET_NBYTES = 2**20


class TransportSuite:
    """Subclass it in a test module and name the transport."""

    transport: str = ""
    device: str = "cpu"
    worker_device: str = ""
    """Where the worker's weights lie, if not where the trainer's do."""
    meets: bool = False
    """Of a pull: whether the two processes meet when they connect, and bytes come only while the trainer lives."""
    bucket_sizes: tuple[int, ...] = (256, 8192, 2**20)
    """Tried one by one; a pull transport needs one only."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "bucket_nbytes" in metafunc.fixturenames:
            metafunc.parametrize("bucket_nbytes", self.bucket_sizes)
        if "case_name" in metafunc.fixturenames:
            metafunc.parametrize("case_name", list(CASES))

    @pytest.fixture(scope="class")
    @classmethod
    def shared_worker(cls) -> Iterator[Peer]:
        """A worker process for tests that leave it alive and in order."""
        with Peer(WorkerSide) as peer:
            yield peer

    @pytest.fixture
    def worker(self) -> Iterator[Peer]:
        with Peer(WorkerSide) as peer:
            yield peer

    @pytest.fixture
    def trainer(self) -> Iterator[Peer]:
        with Peer(TrainerSide, rank=0) as peer:
            yield peer

    @property
    def workers_device(self) -> str:
        return self.worker_device or self.device

    @property
    def pulls(self) -> bool:
        return load_transport(self.transport).pulls

    # ---- values

    def test_bytes_arrive_exactly(self, shared_worker: Peer, case_name: str, bucket_nbytes: int) -> None:
        seed = random.SystemRandom().getrandbits(32)
        case = CASES[case_name](random.Random(seed))
        self._rounds(shared_worker, case, seed, bucket_nbytes, is_arena=False)

    def test_arena_to_arena_leaves_gaps_zero(self, shared_worker: Peer) -> None:
        seed = random.SystemRandom().getrandbits(32)
        self._rounds(shared_worker, arena_case(random.Random(seed)), seed, 4096, is_arena=True)

    def test_a_plan_without_copies_works(self, shared_worker: Peer) -> None:
        case = TransportCase(copies=(), src_nbytes=(64,), dst_nbytes=(64,))
        self._rounds(shared_worker, case, random.SystemRandom().getrandbits(32), 4096, is_arena=False)

    def _rounds(self, worker: Peer, case: TransportCase, seed: int, bucket_nbytes: int, *, is_arena: bool) -> None:
        """Four rounds of fresh values into two memories in turn; all bytes of the destination are compared."""
        generator = torch.Generator().manual_seed(seed)
        nbytes = sum(copy.nbytes for copy in case.copies)
        with self._pair(worker, case, bucket_nbytes) as trainer:
            for round_number in range(4):
                number = round_number % 2
                values, canary = case.new_values(generator), case.new_canary(generator)
                if is_arena:
                    canary = [torch.zeros_like(storage) for storage in canary]
                    values = [_only_elements(case, storage) for storage in values]
                worker.call("fill", number, [storage.numpy().tobytes() for storage in canary], is_arena)
                trainer.write([storage.numpy().tobytes() for storage in values])
                assert self._round(trainer, worker, number) == (nbytes, nbytes), f"seed {seed}"
                assert worker.call("read", number) == case.expected(values, canary), f"seed {seed}, {round_number=}"

    def _round(self, trainer: TrainerSide, worker: Peer, number: int = 0) -> tuple[int, int]:
        """One round as the control channel orders it: a pull begins when the values are there."""
        if self.pulls:
            sent = trainer.send()
            return sent, worker.call("receive", number)
        worker.start("receive", number)
        return trainer.send(), worker.result()

    @contextlib.contextmanager
    def _pair(self, worker: Peer, case: TransportCase, bucket_nbytes: int) -> Iterator[TrainerSide]:
        """A connected pair: the trainer here, the worker in its process."""
        trainer = TrainerSide()
        offer = trainer.open(self.transport, self.device, case.copies, case.src_nbytes, bucket_nbytes)
        try:
            worker.call("open", self.transport, self.workers_device, offer, case.copies)
            worker.start("connect")
            trainer.connect()
            worker.result()
            yield trainer
            worker.call("close")
        finally:
            trainer.close()

    # ---- deadlines

    def test_connect_ends_at_its_deadline_when_nobody_comes(self) -> None:
        self._skip_pull("the trainer's connect does not wait", is_connect=True)
        case = bulk_case(1024)
        trainer = TrainerSide()
        offer = trainer.open(self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        worker = WorkerSide()
        worker.open(self.transport, self.workers_device, offer, case.copies)
        try:
            for side in (trainer, worker):
                with _within(0.3 + PROMPTLY_S), pytest.raises(DeadlineExceeded):
                    side.connect(0.3)
                _assert_dead(side)
        finally:
            worker.close()
            trainer.close()

    def test_send_ends_at_its_deadline_when_nobody_receives(self, shared_worker: Peer) -> None:
        self._skip_pull("nobody waits in send")
        with self._bulk_pair(shared_worker) as trainer:
            with _within(0.5 + PROMPTLY_S), pytest.raises(DeadlineExceeded):
                trainer.send(0.5)
            _assert_dead(trainer)

    def test_receive_ends_at_its_deadline_when_nobody_sends(self, shared_worker: Peer) -> None:
        self._skip_pull("receive does not need the trainer")
        with self._bulk_pair(shared_worker):
            with _within(0.5 + PROMPTLY_S):
                assert _failure(shared_worker, "receive", 0, 0.5) == "DeadlineExceeded"
            assert _failure(shared_worker, "receive", 0, 5.0) == "TransportError"

    def test_a_frozen_peer_does_not_hold_connect_beyond_its_deadline(self, worker: Peer, trainer: Peer) -> None:
        self._skip_pull("connect does not need the peer to run", is_connect=True)
        case = bulk_case(1024)
        offer = trainer.call("open", self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        worker.call("open", self.transport, self.workers_device, offer, case.copies)
        trainer.freeze()
        with _within(0.5 + PROMPTLY_S):
            assert _failure(worker, "connect", 0.5) == "DeadlineExceeded"

    def test_a_frozen_peer_does_not_hold_a_transfer_beyond_its_deadline(self, worker: Peer) -> None:
        self._skip_pull("the transfer does not need the peer to run")
        with self._bulk_pair(worker) as trainer:
            worker.start("receive", 0)
            worker.freeze()
            with _within(0.5 + PROMPTLY_S), pytest.raises(DeadlineExceeded):
                trainer.send(0.5)

    # ---- death

    def test_connect_to_a_dead_trainer_is_peer_lost(self, trainer: Peer, shared_worker: Peer) -> None:
        case = bulk_case(1024)
        offer = trainer.call("open", self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        trainer.kill()
        shared_worker.call("open", self.transport, self.workers_device, offer, case.copies)
        with _within(PROMPTLY_S):
            assert _failure(shared_worker, "connect", 10.0) == "PeerLost"
        assert _failure(shared_worker, "connect", 10.0) == "TransportError"
        shared_worker.call("close")

    def test_a_worker_killed_before_the_transfer_is_peer_lost(self, worker: Peer) -> None:
        self._skip_pull("send does not need the worker")
        with self._bulk_pair(worker) as trainer:
            worker.kill()
            with _within(PROMPTLY_S), pytest.raises(PeerLost):
                trainer.send()
            _assert_dead(trainer)

    def test_a_worker_killed_in_the_middle_of_a_transfer_is_peer_lost(self, worker: Peer) -> None:
        self._skip_pull("send does not need the worker")
        with self._bulk_pair(worker) as trainer:
            worker.start("receive", 0)
            # Frozen it cannot finish, so the kill hits a transfer that is under way.
            worker.freeze()
            with _after(0.3, worker.kill) as at, pytest.raises(PeerLost):
                trainer.send()
            assert time.monotonic() - at[0] < PROMPTLY_S
            _assert_dead(trainer)

    def test_a_trainer_killed_in_the_middle_is_peer_lost_or_harmless(self, trainer: Peer) -> None:
        case = bulk_case(BULK_NBYTES)
        offer = trainer.call("open", self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        values = random.randbytes(BULK_NBYTES)
        trainer.call("write", [values])
        worker = WorkerSide()
        worker.open(self.transport, self.workers_device, offer, case.copies)
        worker.make(0, case.dst_nbytes)
        try:
            trainer.start("connect")
            worker.connect()
            trainer.result()
            if self.pulls:
                trainer.kill()
                if self.meets:
                    with _within(PROMPTLY_S), pytest.raises(PeerLost):
                        worker.receive()
                    _assert_dead(worker)
                    return
                assert worker.receive() == BULK_NBYTES
                assert worker.read() == [values]
                return
            trainer.start("send")
            trainer.freeze()
            with _after(0.3, trainer.kill) as at, pytest.raises(PeerLost):
                worker.receive()
            assert time.monotonic() - at[0] < PROMPTLY_S
            _assert_dead(worker)
        finally:
            worker.close()

    # ---- abort

    def test_abort_ends_a_blocked_connect(self) -> None:
        self._skip_pull("connect does not wait", is_connect=True)
        case = bulk_case(1024)
        trainer = TrainerSide()
        trainer.open(self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        try:
            with _after(0.2, trainer.abort) as at, pytest.raises(TransportError) as caught:
                trainer.connect()
            assert time.monotonic() - at[0] < PROMPTLY_S
            assert not isinstance(caught.value, PeerLost)
        finally:
            trainer.close()

    def test_abort_ends_a_blocked_send_and_frees_the_peer(self, shared_worker: Peer) -> None:
        self._skip_pull("send does not wait")
        with self._bulk_pair(shared_worker) as trainer:
            with _after(0.2, trainer.abort) as at, pytest.raises(TransportError) as caught:
                trainer.send()
            assert time.monotonic() - at[0] < PROMPTLY_S
            assert not isinstance(caught.value, PeerLost)
            _assert_dead(trainer)
            with _within(PROMPTLY_S):
                assert _failure(shared_worker, "receive", 0, 10.0) == "PeerLost"

    def test_abort_ends_a_blocked_receive_and_frees_the_peer(self, shared_worker: Peer) -> None:
        self._skip_pull("receive does not wait")
        with self._bulk_pair(shared_worker) as trainer:
            shared_worker.call("abort_after", 0.2)
            with _within(0.2 + PROMPTLY_S):
                assert _failure(shared_worker, "receive", 0, 10.0) == "TransportError"
            with _within(PROMPTLY_S), pytest.raises(PeerLost):
                trainer.send()

    def test_an_aborted_end_is_dead(self, shared_worker: Peer) -> None:
        with self._bulk_pair(shared_worker) as trainer:
            trainer.abort()
            shared_worker.call("abort")
            _assert_dead(trainer)
            with _within(PROMPTLY_S):
                assert _failure(shared_worker, "receive", 0, 10.0) == "TransportError"

    # ---- leftovers

    def test_nothing_is_left_after_close(self, worker: Peer, trainer: Peer) -> None:
        case = bulk_case(2**20)
        before = None
        # The first cycle loads what stays for the life of a process.
        for _ in range(3):
            self._cycle(trainer, worker, case)
            for peer in (trainer, worker):
                peer.call("close")
                peer.call("close")
            after = trainer.call("census"), worker.call("census")
            assert before in (None, after)
            before = after

    def test_nothing_is_left_of_a_peer_that_was_killed(self, trainer: Peer, worker: Peer) -> None:
        case = bulk_case(2**20)
        self._cycle(trainer, worker, case)
        worker.call("close")
        trainer.call("close")
        clean = worker.call("census")
        self._cycle(trainer, worker, case)
        trainer.kill()
        if self.meets or not self.pulls:
            assert _failure(worker, "receive", 0, 10.0) == "PeerLost"
        worker.call("close")
        assert worker.call("census") == clean

    def test_a_new_pair_works_after_a_failed_one(self, shared_worker: Peer) -> None:
        with self._bulk_pair(shared_worker) as trainer:
            trainer.abort()
        with self._bulk_pair(shared_worker) as trainer:
            values = random.randbytes(BULK_NBYTES)
            trainer.write([values])
            self._round(trainer, shared_worker)
            assert shared_worker.call("read") == [values]

    def _cycle(self, trainer: Peer, worker: Peer, case: TransportCase) -> None:
        """Both sides in processes of their own, connected, one round done."""
        offer = trainer.call("open", self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        worker.call("open", self.transport, self.workers_device, offer, case.copies)
        worker.call("make", 0, case.dst_nbytes)
        worker.start("connect")
        trainer.call("connect")
        worker.result()
        if self.pulls:
            trainer.call("send")
            worker.call("receive")
        else:
            worker.start("receive")
            trainer.call("send")
            worker.result()

    # ---- offers

    def test_malformed_offers_are_protocol_errors(self) -> None:
        transport = load_transport(self.transport)
        case = bulk_case(1024)
        trainer = TrainerSide()
        offer = trainer.open(self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        trainer.close()
        for bad in (b"", b"\xc1", random.randbytes(40), offer[:-1], offer + b"\x00", b"\x80", b"\x81\xa1x\x01"):
            with pytest.raises(ProtocolError):
                transport.worker_end(bad, case.copies)

    # ---- helpers

    @contextlib.contextmanager
    def _bulk_pair(self, worker: Peer) -> Iterator[TrainerSide]:
        """A connected pair over more bytes than any socket buffer holds. Closed whatever became of the worker."""
        case = bulk_case(BULK_NBYTES)
        trainer = TrainerSide()
        offer = trainer.open(self.transport, self.device, case.copies, case.src_nbytes, SMALL_BUCKET_NBYTES)
        try:
            worker.call("open", self.transport, self.workers_device, offer, case.copies)
            worker.call("make", 0, case.dst_nbytes)
            worker.start("connect")
            trainer.connect()
            worker.result()
            yield trainer
        finally:
            trainer.close()

    def _skip_pull(self, reason: str, *, is_connect: bool = False) -> None:
        if self.pulls and not (is_connect and self.meets):
            pytest.skip(f"pull transport: {reason}")


def _only_elements(case: TransportCase, storage: torch.Tensor) -> torch.Tensor:
    """Zeros between the elements, as an arena promises."""
    kept = torch.zeros_like(storage)
    for copy in case.copies:
        start = copy.src_offset * (copy.nbytes // copy.region.numel)
        kept[start : start + copy.nbytes] = storage[start : start + copy.nbytes]
    return kept


def _assert_dead(side: TrainerSide | WorkerSide) -> None:
    """Every later call raises TransportError at once."""
    calls: tuple[Callable[[float], object], ...] = (
        side.connect,
        side.send if isinstance(side, TrainerSide) else _receive_into_any(side),
    )
    for call in calls:
        with _within(PROMPTLY_S), pytest.raises(TransportError):
            call(10.0)


def _receive_into_any(side: WorkerSide) -> Callable[[float], object]:
    return lambda timeout_s: side.end.receive(Memory([]), Deadline(timeout_s))


def _failure(peer: Peer, method: str, *args: object) -> str:
    """The name of the error that a call in another process ends with."""
    with pytest.raises(RankFailed) as caught:
        peer.call(method, *args)
    return caught.value.kind


@contextlib.contextmanager
def _within(limit_s: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    took_s = time.monotonic() - start
    assert took_s < limit_s, f"took {took_s:.2f} s, limit {limit_s:g} s"


@contextlib.contextmanager
def _after(delay_s: float, action: Callable[[], None]) -> Iterator[list[float]]:
    """Run ``action`` on another thread after a delay; the list gets the moment it began."""
    at: list[float] = []

    def run() -> None:
        at.append(time.monotonic())
        action()

    timer = threading.Timer(delay_s, run)
    timer.start()
    try:
        yield at
    finally:
        timer.join()
