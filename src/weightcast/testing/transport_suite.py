"""The conformance suite of transports: every transport must pass it.

One line gives a transport the suite (the name is a registered one or "module:Class"):

    class TestMine(TransportSuite):
        transport = "mine"

``device`` is where both sides' weights lie, ``worker_device`` where the worker's do if that is another one. Tests run the worker, the
trainer or both in processes of their own; one side is in the test's own process where that can be. Bytes are random and compared exactly.
An abort and a dead peer end a call long before its deadline, so with an error of their own and not with DeadlineExceeded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from weightcast.errors import DeadlineExceeded, PeerLost, ProtocolError, TransportError
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import CASES, TransportCase, arena_case, bulk_case
from weightcast.testing.transport_pairs import BULK_NBYTES, Pairs, after, assert_dead, failure_of
from weightcast.testing.transport_sides import TrainerSide, WorkerSide, load_transport


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

    worker_side: type[WorkerSide] = WorkerSide
    trainer_side: type[TrainerSide] = TrainerSide

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "bucket_nbytes" in metafunc.fixturenames:
            metafunc.parametrize("bucket_nbytes", self.bucket_sizes)
        if "case_name" in metafunc.fixturenames:
            metafunc.parametrize("case_name", list(CASES))

    @pytest.fixture(scope="class")
    @classmethod
    def shared_worker(cls) -> Iterator[Peer]:
        """A worker process for tests that leave it alive and in order."""
        with Peer(cls.worker_side) as peer:
            yield peer

    @pytest.fixture
    def worker(self) -> Iterator[Peer]:
        with Peer(self.worker_side) as peer:
            yield peer

    @pytest.fixture
    def trainer(self) -> Iterator[Peer]:
        with Peer(self.trainer_side, rank=0) as peer:
            yield peer

    @property
    def pairs(self) -> Pairs:
        return Pairs(transport=self.transport, device=self.device, worker_device=self.worker_device or self.device)

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
        with self.pairs.connected(worker, case, bucket_nbytes) as trainer:
            for round_number in range(4):
                number = round_number % 2
                values, canary = case.new_values(generator), case.new_canary(generator)
                if is_arena:
                    canary = [torch.zeros_like(storage) for storage in canary]
                    values = [_only_elements(case, storage) for storage in values]
                worker.call("fill", number, [storage.numpy().tobytes() for storage in canary], is_arena)
                trainer.write([storage.numpy().tobytes() for storage in values])
                assert self.pairs.play(trainer, worker, number) == (nbytes, nbytes), f"seed {seed}"
                assert worker.call("read", number) == case.expected(values, canary), f"seed {seed}, {round_number=}"

    # ---- deadlines

    def test_connect_ends_at_its_deadline_when_nobody_comes(self) -> None:
        self._skip_pull("the trainer's connect does not wait", is_connect=True)
        case = bulk_case(1024)
        trainer = TrainerSide()
        offer = self.pairs.offer_of(trainer, case)
        worker = WorkerSide()
        self.pairs.open_worker(worker, offer, case)
        try:
            for side in (trainer, worker):
                with pytest.raises(DeadlineExceeded):
                    side.connect(0.3)
                assert_dead(side)
        finally:
            worker.close()
            trainer.close()

    def test_send_ends_at_its_deadline_when_nobody_receives(self, shared_worker: Peer) -> None:
        self._skip_pull("nobody waits in send")
        with self.pairs.bulk(shared_worker) as trainer:
            with pytest.raises(DeadlineExceeded):
                trainer.send(0.5)
            assert_dead(trainer)

    def test_receive_ends_at_its_deadline_when_nobody_sends(self, shared_worker: Peer) -> None:
        self._skip_pull("receive does not need the trainer")
        with self.pairs.bulk(shared_worker):
            assert failure_of(shared_worker, "receive", 0, 0.5) == "DeadlineExceeded"
            assert failure_of(shared_worker, "receive", 0) == "TransportError"

    def test_a_frozen_peer_does_not_hold_connect_beyond_its_deadline(self, worker: Peer, trainer: Peer) -> None:
        self._skip_pull("connect does not need the peer to run", is_connect=True)
        case = bulk_case(1024)
        offer = self.pairs.offer_of(trainer, case)
        self.pairs.open_worker(worker, offer, case)
        trainer.freeze()
        assert failure_of(worker, "connect", 0.5) == "DeadlineExceeded"

    def test_a_frozen_peer_does_not_hold_a_transfer_beyond_its_deadline(self, worker: Peer) -> None:
        self._skip_pull("the transfer does not need the peer to run")
        with self.pairs.bulk(worker) as trainer:
            worker.start("receive", 0)
            worker.freeze()
            with pytest.raises(DeadlineExceeded):
                trainer.send(0.5)

    # ---- death

    def test_connect_to_a_dead_trainer_is_peer_lost(self, trainer: Peer, shared_worker: Peer) -> None:
        case = bulk_case(1024)
        offer = self.pairs.offer_of(trainer, case)
        trainer.kill()
        self.pairs.open_worker(shared_worker, offer, case)
        assert failure_of(shared_worker, "connect") == "PeerLost"
        assert failure_of(shared_worker, "connect") == "TransportError"
        shared_worker.call("close")

    def test_a_worker_killed_before_the_transfer_is_peer_lost(self, worker: Peer) -> None:
        self._skip_pull("send does not need the worker")
        with self.pairs.bulk(worker) as trainer:
            worker.kill()
            with pytest.raises(PeerLost):
                trainer.send()
            assert_dead(trainer)

    def test_a_worker_killed_in_the_middle_of_a_transfer_is_peer_lost(self, worker: Peer) -> None:
        self._skip_pull("send does not need the worker")
        with self.pairs.bulk(worker) as trainer:
            worker.start("receive", 0)
            # Frozen it cannot finish, so the kill hits a transfer that is under way.
            worker.freeze()
            with after(0.3, worker.kill), pytest.raises(PeerLost):
                trainer.send()
            assert_dead(trainer)

    def test_a_trainer_killed_in_the_middle_is_peer_lost_or_harmless(self, trainer: Peer) -> None:
        case = bulk_case(BULK_NBYTES)
        offer = self.pairs.offer_of(trainer, case)
        values = random.randbytes(BULK_NBYTES)
        trainer.call("write", [values])
        worker = WorkerSide()
        self.pairs.open_worker(worker, offer, case)
        worker.make(0, case.dst_nbytes)
        try:
            trainer.start("connect")
            worker.connect()
            trainer.result()
            if self.pairs.pulls:
                trainer.kill()
                if self.meets:
                    with pytest.raises(PeerLost):
                        worker.receive()
                    assert_dead(worker)
                    return
                assert worker.receive() == BULK_NBYTES
                assert worker.read() == [values]
                return
            trainer.start("send")
            trainer.freeze()
            with after(0.3, trainer.kill), pytest.raises(PeerLost):
                worker.receive()
            assert_dead(worker)
        finally:
            worker.close()

    # ---- abort

    def test_abort_ends_a_blocked_connect(self) -> None:
        self._skip_pull("connect does not wait", is_connect=True)
        case = bulk_case(1024)
        trainer = TrainerSide()
        self.pairs.offer_of(trainer, case)
        try:
            with after(0.2, trainer.abort), pytest.raises(TransportError) as caught:
                trainer.connect()
            assert not isinstance(caught.value, PeerLost)
        finally:
            trainer.close()

    def test_abort_ends_a_blocked_send_and_frees_the_peer(self, shared_worker: Peer) -> None:
        self._skip_pull("send does not wait")
        with self.pairs.bulk(shared_worker) as trainer:
            with after(0.2, trainer.abort), pytest.raises(TransportError) as caught:
                trainer.send()
            assert not isinstance(caught.value, PeerLost)
            assert_dead(trainer)
            assert failure_of(shared_worker, "receive", 0) == "PeerLost"

    def test_abort_ends_a_blocked_receive_and_frees_the_peer(self, shared_worker: Peer) -> None:
        self._skip_pull("receive does not wait")
        with self.pairs.bulk(shared_worker) as trainer:
            shared_worker.call("abort_after", 0.2)
            assert failure_of(shared_worker, "receive", 0) == "TransportError"
            with pytest.raises(PeerLost):
                trainer.send()

    def test_an_aborted_end_is_dead(self, shared_worker: Peer) -> None:
        with self.pairs.bulk(shared_worker) as trainer:
            trainer.abort()
            shared_worker.call("abort")
            assert_dead(trainer)
            assert failure_of(shared_worker, "receive", 0) == "TransportError"

    # ---- leftovers

    def test_nothing_is_left_after_close(self, worker: Peer, trainer: Peer) -> None:
        case = bulk_case(2**20)
        before = None
        # The first cycle loads what stays for the life of a process.
        for _ in range(3):
            self.pairs.cycle(trainer, worker, case)
            for peer in (trainer, worker):
                peer.call("close")
                peer.call("close")
            now = trainer.call("census"), worker.call("census")
            assert before in (None, now)
            before = now

    def test_nothing_is_left_of_a_peer_that_was_killed(self, trainer: Peer, worker: Peer) -> None:
        case = bulk_case(2**20)
        self.pairs.cycle(trainer, worker, case)
        worker.call("close")
        trainer.call("close")
        clean = worker.call("census")
        self.pairs.cycle(trainer, worker, case)
        trainer.kill()
        if self.meets or not self.pairs.pulls:
            assert failure_of(worker, "receive", 0) == "PeerLost"
        worker.call("close")
        assert worker.call("census") == clean

    def test_a_new_pair_works_after_a_failed_one(self, shared_worker: Peer) -> None:
        with self.pairs.bulk(shared_worker) as trainer:
            trainer.abort()
        with self.pairs.bulk(shared_worker) as trainer:
            values = random.randbytes(BULK_NBYTES)
            trainer.write([values])
            self.pairs.play(trainer, shared_worker)
            assert shared_worker.call("read") == [values]

    # ---- offers

    def test_malformed_offers_are_protocol_errors(self) -> None:
        transport = load_transport(self.transport)
        case = bulk_case(1024)
        trainer = TrainerSide()
        offer = self.pairs.offer_of(trainer, case)
        trainer.close()
        for bad in (b"", b"\xc1", random.randbytes(40), offer[:-1], offer + b"\x00", b"\x80", b"\x81\xa1x\x01"):
            with pytest.raises(ProtocolError):
                transport.worker_end(bad, case.copies)

    def _skip_pull(self, reason: str, *, is_connect: bool = False) -> None:
        if self.pairs.pulls and not (is_connect and self.meets):
            pytest.skip(f"pull transport: {reason}")


def _only_elements(case: TransportCase, storage: torch.Tensor) -> torch.Tensor:
    """Zeros between the elements, as an arena promises."""
    kept = torch.zeros_like(storage)
    for copy in case.copies:
        start = copy.src_offset * (copy.nbytes // copy.region.numel)
        kept[start : start + copy.nbytes] = storage[start : start + copy.nbytes]
    return kept
