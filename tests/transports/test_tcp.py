"""tcp and tls: the suite, and what only they do."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch.distributed

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, PeerLost, PlanMismatch, ProtocolError, TransportError
from weightcast.layout.memory import Memory
from weightcast.testing.transport_cases import bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide
from weightcast.testing.transport_suite import TransportSuite
from weightcast.transports.certificates import own_identity
from weightcast.transports.connection import Connection
from weightcast.transports.guard import EndGuard
from weightcast.transports.rendezvous import MOST_CALLERS, Listener, dial
from weightcast.transports.tcp import TcpOffer, TcpTransport
from weightcast.transports.tls import TlsTransport

CASE = bulk_case(5000)


class TestTcp(TransportSuite):
    transport = "tcp"


class TestTls(TransportSuite):
    transport = "tls"
    bucket_sizes = (8192,)


def _trainer(transport: str = "tcp") -> tuple[TrainerSide, TcpOffer]:
    trainer = TrainerSide()
    offer = trainer.open(transport, "cpu", CASE.copies, CASE.src_nbytes, 1024)
    return trainer, msgspec.msgpack.decode(offer, type=TcpOffer)


@contextlib.contextmanager
def _beside(work: Callable[[], object]) -> Iterator[Future[object]]:
    """``work`` on a thread; its error is raised by the future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


@contextlib.contextmanager
def _pair(transport: str = "tcp") -> Iterator[tuple[TrainerSide, WorkerSide]]:
    trainer, offer = _trainer(transport)
    worker = WorkerSide()
    worker.open(transport, "cpu", msgspec.msgpack.encode(offer), CASE.copies)
    try:
        with _beside(worker.connect) as connected:
            trainer.connect()
            connected.result(20)
        yield trainer, worker
    finally:
        worker.close()
        trainer.close()


def _publish(trainer: TrainerSide, worker: WorkerSide) -> None:
    """One round of random values, compared."""
    values = os.urandom(5000)
    trainer.write([values])
    worker.make(0, CASE.dst_nbytes)
    with _beside(trainer.send) as sent:
        assert worker.receive() == 5000
        sent.result(20)
    assert worker.read() == [values]


def test_strangers_are_turned_away_and_the_worker_gets_in() -> None:
    """Silent ones, and such as talk nonsense; they are many, and nobody waits for one after the other."""
    trainer, offer = _trainer()
    worker = WorkerSide()
    worker.open("tcp", "cpu", msgspec.msgpack.encode(offer), CASE.copies)
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.close)
        stack.callback(worker.close)
        strangers = [
            stack.enter_context(socket.create_connection((offer.address, offer.port), timeout=5)) for _ in range(40)
        ]
        for number, stranger in enumerate(strangers):
            stranger.sendall(os.urandom(number * 3))
        # One after the other they would take two seconds each, which is longer than connecting may take.
        with _beside(worker.connect) as connected:
            trainer.connect()
            connected.result(20)
        _publish(trainer, worker)
        for stranger in strangers:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


def test_more_strangers_than_are_listened_to_keep_no_worker_out() -> None:
    trainer, offer = _trainer()
    worker = WorkerSide()
    worker.open("tcp", "cpu", msgspec.msgpack.encode(offer), CASE.copies)
    with contextlib.ExitStack() as stack:
        stack.callback(trainer.close)
        stack.callback(worker.close)
        with _beside(trainer.connect) as connected:
            for _ in range(MOST_CALLERS + 50):
                stack.enter_context(socket.create_connection((offer.address, offer.port), timeout=5))
            worker.connect()
            connected.result(20)
        _publish(trainer, worker)


def test_without_a_free_descriptor_a_listener_waits_and_does_not_spin() -> None:
    guard = EndGuard("test")
    listener = Listener("127.0.0.1", guard)
    own, tries = listener._socket, [0]

    class Full:
        """The listening socket of a process that may open nothing more."""

        def fileno(self) -> int:
            return own.fileno()

        def accept(self) -> tuple[socket.socket, Any]:
            tries[0] += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    listener._socket = Full()  # type: ignore[assignment]
    with own, socket.create_connection(("127.0.0.1", listener.port), timeout=5):
        with pytest.raises(DeadlineExceeded):
            listener.accept(Deadline(0.5))
        assert 1 <= tries[0] < 20
        listener._socket = own  # descriptors are free again
        with _beside(lambda: dial("127.0.0.1", listener.port, listener.secret, Deadline(20), guard).close()) as dialled:
            (connection,) = listener.accept(Deadline(20))
            connection.close()
            dialled.result(20)


def test_a_listener_that_does_not_know_the_secret_is_refused_by_the_worker() -> None:
    trainer, offer = _trainer()
    trainer.close()
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        worker = WorkerSide()
        other = msgspec.structs.replace(offer, port=impostor.getsockname()[1])
        worker.open("tcp", "cpu", msgspec.msgpack.encode(other), CASE.copies)
        with _beside(worker.connect) as connected:
            peer, _ = impostor.accept()
            with peer:
                heard = peer.recv(4096)
                assert offer.secret not in heard
                peer.sendall(os.urandom(64))
                with pytest.raises(TransportError, match="does not know the pair's secret"):
                    connected.result(20)
        worker.close()


@pytest.mark.parametrize("address", ["a..b", "x" * 300, "a\0b", "nowhere.invalid", ""])
def test_an_address_that_is_none_is_a_named_error(address: str) -> None:
    with pytest.raises(TransportError, match="cannot resolve the trainer's address"):
        dial(address, 1, bytes(32), Deadline(10), EndGuard("an end"))


def test_an_answer_that_was_heard_once_lets_nobody_in_again() -> None:
    """What the worker said to one trainer's nonce is no answer to another nonce."""
    trainer, offer = _trainer()
    said: list[bytes] = []
    with _beside(trainer.connect) as connected:
        worker = WorkerSide()
        worker.open("tcp", "cpu", msgspec.msgpack.encode(offer), CASE.copies)
        send = Connection.send

        def overheard(connection: Connection, spans: Sequence[bytes], *arguments: Any) -> None:
            said.extend(bytes(span) for span in spans)
            send(connection, spans, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "send", overheard)
            worker.connect()
        connected.result(20)
    worker.close()
    trainer.close()
    guard = EndGuard("a test's end")
    listener = Listener("127.0.0.1", guard)
    listener.secret = offer.secret
    try:
        with _beside(lambda: listener.accept(Deadline(3))) as accepted:
            with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as replay:
                replay.sendall(said[0])
                assert len(replay.recv(4096)) == 64
                replay.sendall(said[1])
                assert replay.recv(1) == b""
            with pytest.raises(DeadlineExceeded):
                accepted.result(20)
    finally:
        listener.close()


def _own_header(number: int, nbytes: int, kind: int = 0) -> bytes:
    return struct.pack("!QQB", number, nbytes, kind)


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param(struct.pack("=QQQQQQQQ", 0, 1, 2, 3, 4, 5, 6, 7), id="64 bytes"),
        pytest.param(os.urandom(100_000), id="random"),
        pytest.param(_own_header(0, 1 << 63), id="a size beyond memory"),
        pytest.param(_own_header(7, 1024), id="another bucket"),
        pytest.param(_own_header(0, 500, 1), id="changes of what is not there"),
        pytest.param(_own_header(0, 1024, 2), id="an unknown kind"),
        pytest.param(bytes(4096), id="zeros"),
    ],
)
def test_a_trainer_that_talks_nonsense_ends_the_pair_and_no_process(nonsense: bytes) -> None:
    with _pair() as (trainer, worker):
        worker.make(0, CASE.dst_nbytes)
        connection = trainer.end._lanes._connections[0]  # type: ignore[attr-defined]
        connection.send([nonsense], Deadline(10), "talking nonsense")
        with pytest.raises((ProtocolError, PeerLost)):
            worker.receive(timeout_s=3)
        with pytest.raises(TransportError):
            worker.receive()


@pytest.mark.parametrize("nonsense", [struct.pack("=QQQQQQQQ", *range(8)), os.urandom(300_000)], ids=["64", "many"])
def test_a_worker_that_talks_nonsense_disturbs_no_round(nonsense: bytes) -> None:
    with _pair() as (trainer, worker):
        connection = worker.end._lanes._connections[0]  # type: ignore[attr-defined]
        connection.send([nonsense], Deadline(10), "talking nonsense")
        _publish(trainer, worker)


def test_tls_hides_what_tcp_shows() -> None:
    """Looked at where the sockets are: what goes to the kernel over tcp are the values, over tls they are not."""
    for transport in ("tcp", "tls"):
        with _pair(transport) as (trainer, worker):
            values = os.urandom(5000)
            trainer.write([values])
            worker.make(0, CASE.dst_nbytes)
            raw = worker.end._lanes._connections[0].socket  # type: ignore[attr-defined]
            with _beside(trainer.send) as sent, _plain(raw) as plain:
                seen = b""
                while len(seen) < 1024:  # all of the first bucket, in either form
                    with contextlib.suppress(BlockingIOError):
                        seen = plain.recv(65536, socket.MSG_PEEK)
                worker.receive()
                sent.result(20)
            assert (values[:200] in seen) == (transport == "tcp")
            assert worker.read() == [values]


def _plain(connection: socket.socket) -> socket.socket:
    """The same connection without TLS around it."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def test_a_peer_with_another_certificate_is_refused() -> None:
    """Somebody who learnt the secret, but not the key, gets nothing."""
    trainer, offer = _trainer("tls")
    worker = WorkerSide()
    own_identity.cache_clear()
    other = msgspec.structs.replace(offer, identity=own_identity())
    assert other.identity != offer.identity
    worker.open("tls", "cpu", msgspec.msgpack.encode(other), CASE.copies)
    try:
        with _beside(worker.connect) as connected:
            with pytest.raises((TransportError, PeerLost)):
                trainer.connect(10)
            with pytest.raises((TransportError, PeerLost)):
                connected.result(20)
    finally:
        worker.close()
        trainer.close()


def test_a_worker_that_resets_before_the_tls_handshake_is_a_lost_peer() -> None:
    trainer, offer = _trainer("tls")
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        guard = EndGuard("an end")
        end = trainer.end
        assert end is not None
        accepted = pool.submit(
            lambda: [
                stack.enter_context(
                    contextlib.closing(dial(offer.address, offer.port, offer.secret, Deadline(10), guard, lane=lane))
                )
                for lane in range(offer.lanes)
            ]
        )
        accept = end._listener.accept  # type: ignore[attr-defined]

        def accept_and_lose(deadline: Deadline, lanes: int) -> list[Connection]:
            connections: list[Connection] = accept(deadline, lanes)
            for connection in accepted.result(10):
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            for connection in connections:
                connection.wait(select.POLLIN, deadline, "losing the worker")
            return connections

        end._listener.accept = accept_and_lose  # type: ignore[attr-defined]
        with pytest.raises(PeerLost, match="the TLS handshake"):
            end.connect(Deadline(10))
    trainer.close()


def test_an_offer_of_tcp_is_no_offer_of_tls() -> None:
    trainer, offer = _trainer("tcp")
    trainer.close()
    with pytest.raises(ProtocolError, match="certificate"):
        TlsTransport().worker_end(msgspec.msgpack.encode(offer), CASE.copies)


def test_the_applications_own_process_group_is_not_touched() -> None:
    trainer, _ = _trainer()
    assert not torch.distributed.is_initialized()
    trainer.close()


def test_the_port_is_closed_with_the_end() -> None:
    trainer, offer = _trainer()
    trainer.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((offer.address, offer.port), timeout=5)


def test_a_peer_that_stops_in_the_middle_of_its_proof_ends_at_the_deadline() -> None:
    trainer, offer = _trainer()
    try:
        with socket.create_connection((offer.address, offer.port), timeout=5) as peer:
            peer.sendall(b"wc-pair3\x00")
            with pytest.raises(DeadlineExceeded):
                trainer.connect(0.5)
    finally:
        trainer.close()


def test_other_copies_are_a_plan_mismatch() -> None:
    trainer, offer = _trainer()
    trainer.close()
    with pytest.raises(PlanMismatch):
        TcpTransport().worker_end(msgspec.msgpack.encode(offer), bulk_case(5001).copies)


@pytest.mark.parametrize("nbytes", [0, 100, -256])
def test_an_offer_with_an_odd_bucket_size_is_a_protocol_error(nbytes: int) -> None:
    trainer, offer = _trainer()
    trainer.close()
    bad = msgspec.structs.replace(offer, bucket_nbytes=nbytes)
    with pytest.raises(ProtocolError, match="bucket"):
        TcpTransport().worker_end(msgspec.msgpack.encode(bad), CASE.copies)


def test_an_address_of_another_machine_is_refused_with_what_to_do() -> None:
    with pytest.raises(TransportError, match=r"cannot listen on 192\.0\.2\.77.*Give an address of this machine"):
        TcpTransport().trainer_end(
            CASE.copies, Memory([torch.zeros(5000, dtype=torch.uint8)]), bucket_nbytes=1024, address="192.0.2.77"
        )


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_wildcard_is_no_address_that_a_worker_can_reach(address: str) -> None:
    with pytest.raises(InvalidInput, match="address"):
        TcpTransport().trainer_end((), Memory([]), address=address)


def test_using_an_end_before_connect_is_an_error() -> None:
    trainer, _ = _trainer()
    with pytest.raises(TransportError, match="not connected"):
        trainer.send()
    trainer.close()
