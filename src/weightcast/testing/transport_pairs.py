"""Pairs of one transport: a trainer's side here, a worker's side in a process of its own, connected, and a round between them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from weightcast.deadline import Deadline
from weightcast.errors import TransportError
from weightcast.layout.memory import Memory
from weightcast.testing.ranks import Peer, RankFailed
from weightcast.testing.transport_cases import TransportCase, bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide, load_transport

BULK_NBYTES = 48 * 2**20
"""More than any socket buffer holds."""
SMALL_BUCKET_NBYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """``device`` is where the trainer's weights lie, ``worker_device`` where the worker's do."""

    transport: str
    device: str
    worker_device: str

    @property
    def pulls(self) -> bool:
        return load_transport(self.transport).pulls

    @contextlib.contextmanager
    def connected(self, worker: Peer, case: TransportCase, bucket_nbytes: int) -> Iterator[TrainerSide]:
        """A connected pair: the trainer here, the worker in its process."""
        trainer = TrainerSide()
        offer = self.offer_of(trainer, case, bucket_nbytes)
        try:
            self._connect(trainer, worker, offer, case)
            yield trainer
            worker.call("close")
        finally:
            trainer.close()

    @contextlib.contextmanager
    def bulk(self, worker: Peer) -> Iterator[TrainerSide]:
        """A connected pair over BULK_NBYTES. Closed whatever became of the worker."""
        case, trainer = bulk_case(BULK_NBYTES), TrainerSide()
        offer = self.offer_of(trainer, case)
        try:
            self._connect(trainer, worker, offer, case)
            worker.call("make", 0, case.dst_nbytes)
            yield trainer
        finally:
            trainer.close()

    def offer_of(
        self, trainer: TrainerSide | Peer, case: TransportCase, bucket_nbytes: int = SMALL_BUCKET_NBYTES
    ) -> bytes:
        """Open the trainer's side, here or in its process."""
        args = (self.transport, self.device, case.copies, case.src_nbytes, bucket_nbytes)
        offer: bytes = trainer.call("open", *args) if isinstance(trainer, Peer) else trainer.open(*args)
        return offer

    def open_worker(self, worker: WorkerSide | Peer, offer: bytes, case: TransportCase) -> None:
        """Open the worker's side, here or in its process."""
        args = (self.transport, self.worker_device, offer, case.copies)
        if isinstance(worker, Peer):
            worker.call("open", *args)
        else:
            worker.open(*args)

    def _connect(self, trainer: TrainerSide, worker: Peer, offer: bytes, case: TransportCase) -> None:
        self.open_worker(worker, offer, case)
        worker.start("connect")
        trainer.connect()
        worker.result()

    def play(self, trainer: TrainerSide, worker: Peer, number: int = 0) -> tuple[int, int]:
        """One round as the control channel orders it: a pull begins when the values are there."""
        if self.pulls:
            sent = trainer.send()
            return sent, worker.call("receive", number)
        worker.start("receive", number)
        return trainer.send(), worker.result()

    def cycle(self, trainer: Peer, worker: Peer, case: TransportCase) -> None:
        """Both sides in processes of their own, connected, one round done."""
        self.open_worker(worker, self.offer_of(trainer, case), case)
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


def assert_dead(side: TrainerSide | WorkerSide) -> None:
    """Every later call raises TransportError, and none waits for its deadline."""
    transfer = side.send if isinstance(side, TrainerSide) else _receive_into_any(side)
    for call in (side.connect, transfer):
        with pytest.raises(TransportError):
            call()


def _receive_into_any(side: WorkerSide) -> Callable[[], object]:
    return lambda: side.end.receive(Memory([]), Deadline(20.0))


def failure_of(peer: Peer, method: str, *args: object) -> str:
    """The name of the error that a call in another process ends with."""
    with pytest.raises(RankFailed) as caught:
        peer.call(method, *args)
    return caught.value.kind


@contextlib.contextmanager
def after(delay_s: float, action: Callable[[], None]) -> Iterator[None]:
    """Run ``action`` on another thread after a delay."""
    timer = threading.Timer(delay_s, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()
