"""gloo: the suite, and what only it does."""

from __future__ import annotations

import os
import socket
import threading

import msgspec
import pytest
import torch.distributed

from weightcast.errors import DeadlineExceeded, InvalidInput, PlanMismatch, ProtocolError, TransportError
from weightcast.memory import Memory
from weightcast.testing.transport_cases import bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide
from weightcast.testing.transport_suite import TransportSuite
from weightcast.transports.gloo import GlooOffer, GlooTransport

CASE = bulk_case(5000)


class TestGloo(TransportSuite):
    transport = "gloo"


def _trainer() -> tuple[TrainerSide, GlooOffer]:
    trainer = TrainerSide()
    offer = trainer.open("gloo", "cpu", CASE.copies, CASE.src_nbytes, 1024)
    return trainer, msgspec.msgpack.decode(offer, type=GlooOffer)


def test_strangers_are_turned_away_and_the_worker_gets_in() -> None:
    trainer, offer = _trainer()
    worker = WorkerSide()
    worker.open("gloo", "cpu", msgspec.msgpack.encode(offer), CASE.copies)
    thread = threading.Thread(target=trainer.connect)
    try:
        with socket.create_connection((offer.address, offer.port), timeout=5) as wrong:
            wrong.sendall(os.urandom(32))
            with socket.create_connection((offer.address, offer.port), timeout=5):
                thread.start()
                assert wrong.recv(1) == b""
        worker.connect()
        thread.join(10)
        values = os.urandom(5000)
        trainer.write([values])
        worker.make(0, CASE.dst_nbytes)
        thread = threading.Thread(target=trainer.send)
        thread.start()
        assert worker.receive() == 5000
        assert worker.read() == [values]
    finally:
        if thread.ident is not None:
            thread.join(20)
        worker.close()
        trainer.close()


def test_the_applications_own_process_group_is_not_touched() -> None:
    trainer, _ = _trainer()
    assert not torch.distributed.is_initialized()
    trainer.close()


def test_the_port_is_closed_with_the_end() -> None:
    trainer, offer = _trainer()
    trainer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((offer.address, offer.port), timeout=5)


def test_a_peer_that_talks_nonsense_is_a_protocol_error() -> None:
    trainer, offer = _trainer()
    try:
        with socket.create_connection((offer.address, offer.port), timeout=5) as peer:
            peer.sendall(offer.secret + (2**31).to_bytes(4, "big"))
            with pytest.raises(ProtocolError, match="frame of 2147483648 bytes"):
                trainer.connect()
    finally:
        trainer.close()


def test_a_peer_that_says_nothing_after_its_secret_ends_at_the_deadline() -> None:
    trainer, offer = _trainer()
    try:
        with socket.create_connection((offer.address, offer.port), timeout=5) as peer:
            peer.sendall(offer.secret)
            with pytest.raises(DeadlineExceeded):
                trainer.connect(0.5)
    finally:
        trainer.close()


def test_other_copies_are_a_plan_mismatch() -> None:
    trainer, offer = _trainer()
    trainer.close()
    with pytest.raises(PlanMismatch):
        GlooTransport().worker_end(msgspec.msgpack.encode(offer), bulk_case(5001).copies)


@pytest.mark.parametrize("nbytes", [0, 100, -256])
def test_an_offer_with_an_odd_bucket_size_is_a_protocol_error(nbytes: int) -> None:
    trainer, offer = _trainer()
    trainer.close()
    bad = msgspec.structs.replace(offer, bucket_nbytes=nbytes)
    with pytest.raises(ProtocolError, match="bucket"):
        GlooTransport().worker_end(msgspec.msgpack.encode(bad), CASE.copies)


def test_an_address_of_another_machine_is_refused_with_what_to_do() -> None:
    with pytest.raises(TransportError, match=r"cannot listen on 192\.0\.2\.77.*Give an address of this machine"):
        GlooTransport().trainer_end(
            CASE.copies, Memory([torch.zeros(5000, dtype=torch.uint8)]), bucket_nbytes=1024, address="192.0.2.77"
        )


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_wildcard_is_no_address_that_a_worker_can_reach(address: str) -> None:
    with pytest.raises(InvalidInput, match="address"):
        GlooTransport().trainer_end((), Memory([]), address=address)


def test_using_an_end_before_connect_is_an_error() -> None:
    trainer, _ = _trainer()
    with pytest.raises(TransportError, match="not connected"):
        trainer.send()
    trainer.close()
