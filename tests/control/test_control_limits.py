"""What peers of the control channel can make the trainer take: little, and nothing without a key."""

from __future__ import annotations

import logging
import os
import resource
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import zmq

from weightcast.control import ControlLink, Coordinator, JoinInfo
from weightcast.control.coordinator import FRAME_NBYTES, MOST_MESSAGES, Member
from weightcast.control.pieces import PIECE_NBYTES, Joiner
from weightcast.control.strangers import Strangers
from weightcast.deadline import Deadline
from weightcast.errors import PeerLost
from weightcast.facts import Facts
from weightcast.layout import Layout
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Failed, Hello, Landings, Ready, Welcome

MANIFEST = Manifest.of([TensorSpec(name="w", dtype="float32", shape=(2,))])
LARGE = 4 * FRAME_NBYTES


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    made.greet_with(lambda member: Welcome(session="s", manifest=MANIFEST, mode="auto", shadows=1, keep=()))
    yield made
    made.close()


@pytest.fixture
def join(coordinator: Coordinator) -> Iterator[Callable[..., tuple[ControlLink, Member]]]:
    links: list[ControlLink] = []

    def join(**ticket: int | bool) -> tuple[ControlLink, Member]:
        secret = coordinator.issue_ticket("e", 1, **ticket)  # type: ignore[arg-type]
        info = JoinInfo(
            address=f"tcp://127.0.0.1:{coordinator.port}",
            public_key=coordinator.public_key,
            ticket=secret,
            engine="e",
        )
        links.append(ControlLink(info, lambda message: None, lambda reason: None))
        links[-1].send(_hello(secret))
        (member,) = coordinator.wait_members("e", 1, Deadline(10))
        return links[-1], member

    yield join
    for link in links:
        link.close()


def _hello(ticket: str) -> Hello:
    facts = Facts(host="h", pid=os.getpid(), device="cpu")
    about = {"version": "default", "digest": "", "dirty": False, "highest": 0}
    return Hello(ticket=ticket, engine="e", rank=0, world_size=1, facts=facts, **about)  # type: ignore[arg-type]


def landings(nbytes: int) -> Landings:
    """Landings whose message has about so many bytes."""
    layout = LayoutTable.of(Layout(placements=(), storage_nbytes=(), through_loader=("x" * nbytes,)), MANIFEST)
    return Landings(layout=layout, mode="staged", shadow_nbytes=0, shadow="cpu")


def lost(member: Member) -> str:
    limit = Deadline(10)
    while member.lost is None:
        limit.check("losing the member")
        time.sleep(0.01)
    return member.lost


def test_a_member_may_say_one_large_thing(
    coordinator: Coordinator, join: Callable[..., tuple[ControlLink, Member]]
) -> None:
    link, member = join(large_nbytes=2 * LARGE)
    link.send(landings(LARGE))
    heard = coordinator.take(member, Landings, Deadline(10), phase="test")
    assert heard == landings(LARGE)
    link.send(landings(LARGE))
    assert f"at most {FRAME_NBYTES} are due" in lost(member)
    with pytest.raises(PeerLost, match="it sent a frame of"):
        coordinator.take(member, Landings, Deadline(10), phase="test")


def test_a_first_large_thing_is_bounded_by_the_ticket(join: Callable[..., tuple[ControlLink, Member]]) -> None:
    link, member = join(large_nbytes=LARGE)
    link.send(landings(LARGE + 1))
    assert f"at most {LARGE} are due" in lost(member)


def test_other_ranks_of_the_trainer_may_say_as_much_as_they_have_to(
    coordinator: Coordinator, join: Callable[..., tuple[ControlLink, Member]]
) -> None:
    link, member = join(is_trusted=True)
    for _ in range(3):
        link.send(landings(LARGE))
        coordinator.take(member, Landings, Deadline(10), phase="test")


def test_messages_that_nobody_waits_for_do_not_pile_up(join: Callable[..., tuple[ControlLink, Member]]) -> None:
    link, member = join()
    for _ in range(MOST_MESSAGES + 50):
        link.send(Ready(epoch=0, plan_digest="p" * 1000))
    assert f"sent {MOST_MESSAGES} messages that nobody waited for" in lost(member)
    assert len(member.inbox) == MOST_MESSAGES


def test_messages_of_other_epochs_are_dropped_when_they_arrive(
    coordinator: Coordinator, join: Callable[..., tuple[ControlLink, Member]]
) -> None:
    link, member = join()
    coordinator.epoch = 7
    for epoch in (6, 8, 6, 7):
        link.send(Ready(epoch=epoch, plan_digest=f"of {epoch}"))
    assert coordinator.take(member, Ready, Deadline(10), phase="test") == Ready(epoch=7, plan_digest="of 7")
    assert member.inbox == []


def test_who_is_not_admitted_says_nothing_long(coordinator: Coordinator, caplog: pytest.LogCaptureFixture) -> None:
    info = JoinInfo(
        address=f"tcp://127.0.0.1:{coordinator.port}", public_key=coordinator.public_key, ticket="t", engine="e"
    )
    link = ControlLink(info, lambda message: None, lambda reason: None)
    try:
        link.send(landings(3 * PIECE_NBYTES))
        limit = Deadline(10)
        while not any("dropped a frame" in record.message for record in caplog.records):
            limit.check("hearing of the frame")
            time.sleep(0.01)
    finally:
        link.close()
    assert not coordinator.members()


def sent_until_refused(peer: socket.socket) -> int:
    sent = 0
    while sent < 64 * 2**20:
        try:
            sent += peer.send(bytes(2**20))
        except (ConnectionResetError, BrokenPipeError):
            break
    return sent


def test_peers_without_a_key_cannot_fill_the_memory(coordinator: Coordinator) -> None:
    """Each shows ZeroMQ's greeting for CURVE and then announces a command of 200 MiB, of which it sends as much as is taken."""
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\x00") + bytes(32)
    long_command = b"\x06" + (200 * 2**20).to_bytes(8, "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", coordinator.port), timeout=10) as peer:
            peer.sendall(greeting + long_command)
            assert sent_until_refused(peer) < 32 * 2**20
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 32 * 1024


def test_who_has_the_key_and_no_ticket_is_disconnected_in_time_and_a_member_is_not() -> None:
    """One stranger says nothing, one hello with a ticket that is none; the member says hello late, and says no more."""
    coordinator = Coordinator(admission_s=1.0)
    ended: dict[str, str] = {}
    links: dict[str, ControlLink] = {}
    try:
        tickets = {"silent": "", "refused": "no ticket", "member": coordinator.issue_ticket("e", 1)}
        for name, ticket in tickets.items():
            info = JoinInfo(
                address=f"tcp://127.0.0.1:{coordinator.port}",
                public_key=coordinator.public_key,
                ticket=ticket,
                engine="e",
            )
            links[name] = ControlLink(info, lambda message: None, partial(ended.__setitem__, name))
        time.sleep(0.3)
        for name in ("refused", "member"):
            links[name].send(_hello(tickets[name]))
        (member,) = coordinator.wait_members("e", 1, Deadline(10))
        limit = Deadline(20)
        while len(ended) < 2:
            limit.check("hearing that both strangers are disconnected")
            time.sleep(0.02)
        assert set(ended) == {"silent", "refused"}
        assert all("closed before the trainer" in reason or "connection closed" in reason for reason in ended.values())
        links["member"].send(landings(1))
        coordinator.take(member, Landings, Deadline(10), phase="test")
        assert member.lost is None
    finally:
        for link in links.values():
            link.close()
        coordinator.close()


def test_a_descriptor_that_is_another_connection_by_now_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        strangers = Strangers(admission_s=0.0)
        accepted, others = [], []
        for _ in range(2):
            others.append(socket.create_connection(server.getsockname()))
            accepted.append(server.accept()[0])
        first, second = accepted
        number = first.fileno()
        strangers.note(zmq.EVENT_ACCEPTED, number)
        os.dup2(second.fileno(), number)
        assert strangers.close_late() == 1
        second.sendall(b"here")
        assert others[1].recv(4) == b"here"
        strangers.note(zmq.EVENT_ACCEPTED, second.fileno())
        strangers.close_late()
        assert others[1].recv(1) == b""
        for connection in accepted + others:
            connection.close()


def test_failed_messages_of_a_lost_member_are_not_heard(
    coordinator: Coordinator, join: Callable[..., tuple[ControlLink, Member]]
) -> None:
    link, member = join(large_nbytes=0)
    link.send(landings(LARGE))
    lost(member)
    troubles: list[Failed | None] = []
    member.on_trouble = troubles.append
    link.send(Ready(epoch=0, plan_digest=""))
    time.sleep(0.2)
    assert member.inbox == []
    assert troubles == []


def test_a_frame_in_tiny_pieces_takes_the_memory_of_the_frame() -> None:
    frame = os.urandom(2**17)
    joiner = Joiner()
    tracemalloc.start()
    try:
        assert joiner.add(b"\x01" + len(frame).to_bytes(8, "big") + frame[:2], len(frame)) is None
        for start in range(2, len(frame) - 2, 2):
            assert joiner.add(b"\x01" + frame[start : start + 2], len(frame)) is None
        kept, _ = tracemalloc.get_traced_memory()
        assert joiner.add(b"\x00" + frame[-2:], len(frame)) == frame
    finally:
        tracemalloc.stop()
    assert kept < 2 * len(frame)


def test_peers_that_talk_nonsense_fill_no_log(
    coordinator: Coordinator, join: Callable[..., tuple[ControlLink, Member]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "weightcast.control")
    link, _ = join()
    stranger = ControlLink(
        JoinInfo(
            address=f"tcp://127.0.0.1:{coordinator.port}", public_key=coordinator.public_key, ticket="t", engine="e"
        ),
        lambda message: None,
        lambda reason: None,
    )
    for _ in range(50):
        link._pump.send(b"\x00nonsense")
        stranger._pump.send(b"\x00nonsense")
        stranger.send(_hello("no ticket"))
        stranger.send(landings(1))
    link.send(landings(1))  # what comes behind all that is taken
    (member,) = coordinator.members("e")
    coordinator.take(member, Landings, Deadline(10), phase="test")
    limit = Deadline(10)
    while "was not admitted" not in caplog.text or "refused a worker" not in caplog.text:
        limit.check("hearing the stranger")
        time.sleep(0.01)
    stranger.close()
    assert 3 <= len([record for record in caplog.records if record.levelno >= logging.WARNING]) < 10
