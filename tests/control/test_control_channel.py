"""The control channel: who gets in, what is heard, and how a silent or rude peer ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from tests.support.tables import holdings_of

from weightcast.control import ControlLink, Coordinator, JoinInfo
from weightcast.control.tickets import TICKET_HINT
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, DeadlineExceeded, ErrorForm, InvalidInput
from weightcast.facts import Facts
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import AnyMessage, Failed, Hello, Ready, Refused, Setup, Welcome, encode

MANIFEST = Manifest.of([TensorSpec(name="w", dtype="float32", shape=(2,))])
FACTS = Facts(host="h", pid=os.getpid(), device="cpu")


class Worker:
    """A link that keeps what it hears."""

    def __init__(self, coordinator: Coordinator, ticket: str, *, key: str | None = None, timeout_s: float = 20) -> None:
        self.heard: list[AnyMessage] = []
        self.lost: list[str] = []
        info = JoinInfo(
            address=f"tcp://127.0.0.1:{coordinator.port}",
            public_key=key or coordinator.public_key,
            ticket=ticket,
            engine="e",
            timeout_s=timeout_s,
            silence_s=coordinator.silence_s,
        )
        self.link = ControlLink(info, self.heard.append, self.lost.append)
        self.ticket = ticket

    def say_hello(self, rank: int = 0, world_size: int = 1, engine: str = "e", ticket: str | None = None) -> None:
        self.link.send(
            Hello(
                ticket=self.ticket if ticket is None else ticket,
                engine=engine,
                rank=rank,
                world_size=world_size,
                facts=FACTS,
                version="default",
                digest="",
                dirty=False,
                highest=0,
            )
        )

    def wait(self, condition: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.heard, self.lost)
            time.sleep(0.01)


class SlowWorker(Worker):
    """Takes its time over what it hears, as on a busy machine."""

    def __init__(self, coordinator: Coordinator, ticket: str, *, engine: str) -> None:
        super().__init__(coordinator, ticket)
        lost = self.link._on_lost

        def slowly(reason: str) -> None:
            time.sleep(0.3)
            lost(reason)

        self.link._on_lost = slowly
        self.say_hello(engine=engine)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    made.greet_with(lambda member: Welcome(session="s", manifest=MANIFEST, mode="auto", shadows=1, keep=()))
    yield made
    made.close()


@pytest.fixture
def join(coordinator: Coordinator) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def join(ticket: str, **options: object) -> Worker:
        made.append(Worker(coordinator, ticket, **options))  # type: ignore[arg-type]
        return made[-1]

    yield join
    for worker in made:
        worker.link.close()


def test_a_ticket_admits_each_rank_once(coordinator: Coordinator, join: Callable[..., Worker]) -> None:
    ticket = coordinator.issue_ticket("e", 2)
    workers = [join(ticket), join(ticket)]
    for rank, worker in enumerate(workers):
        worker.say_hello(rank, 2)
    members = coordinator.wait_members("e", 2, Deadline(10))
    assert [member.rank for member in members] == [0, 1]
    for worker in workers:
        worker.wait(lambda worker=worker: any(isinstance(m, Welcome) for m in worker.heard))
    late = join(ticket)
    late.say_hello(0, 2)
    late.wait(lambda: late.heard)
    assert isinstance(late.heard[0], Refused)
    assert len(coordinator.members("e")) == 2


@pytest.mark.parametrize(
    "hello",
    [
        {"ticket": "guess"},
        {"ticket": ""},
        {"engine": "other"},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 2},
    ],
)
def test_a_hello_that_does_not_fit_its_ticket_is_refused(
    coordinator: Coordinator, join: Callable[..., Worker], hello: dict[str, object]
) -> None:
    worker = join(coordinator.issue_ticket("e", 1))
    worker.say_hello(**hello)  # type: ignore[arg-type]
    worker.wait(lambda: worker.heard)
    (answer,) = worker.heard
    assert isinstance(answer, Refused)
    assert (answer.error.kind, answer.error.hint) == ("AuthError", TICKET_HINT)
    assert not coordinator.members()
    worker.say_hello()
    assert coordinator.wait_members("e", 1, Deadline(10))


def test_tickets_expire_and_newer_ones_replace_them(coordinator: Coordinator, join: Callable[..., Worker]) -> None:
    old = coordinator.issue_ticket("e", 1)
    short = coordinator.issue_ticket("e", 1, life_s=0.05)
    time.sleep(0.1)
    for ticket in (old, short):
        worker = join(ticket)
        worker.say_hello()
        worker.wait(lambda worker=worker: worker.heard)
        assert isinstance(worker.heard[0], Refused)


def test_a_peer_without_the_key_gets_nothing(coordinator: Coordinator, join: Callable[..., Worker]) -> None:
    ticket = coordinator.issue_ticket("e", 1)
    stranger = join(ticket, key=zmq.curve_keypair()[0].decode(), timeout_s=0.5)
    stranger.say_hello()
    stranger.wait(lambda: stranger.lost)
    assert stranger.heard == []
    context = zmq.Context()
    try:
        plain = context.socket(zmq.DEALER)
        plain.linger = 0
        plain.connect(f"tcp://127.0.0.1:{coordinator.port}")
        plain.send(encode(Ready(epoch=1, plan_digest="")))
        assert plain.poll(300) == 0
        plain.close()
    finally:
        context.term()
    assert not coordinator.members()


def test_garbage_is_logged_and_ends_nothing(
    coordinator: Coordinator, join: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = join(coordinator.issue_ticket("e", 1))
    worker.say_hello()
    (member,) = coordinator.wait_members("e", 1, Deadline(10))
    with caplog.at_level(logging.WARNING, "weightcast"):
        for frame in (b"", b"\x02", b"\x00garbage", b"\x00" + os.urandom(50)):
            worker.link._pump.send(frame)
            coordinator._pump.send(member.identity, frame)
        coordinator.epoch = 3
        worker.link.send(Ready(epoch=3, plan_digest="ab"))
        heard = coordinator.take(member, Ready, Deadline(10), phase="test")
        coordinator.send(member, Setup(epoch=1, holdings=holdings_of(MANIFEST, {}), offers=(), timeout_s=1))
        worker.wait(lambda: any(isinstance(m, Setup) for m in worker.heard))
    assert heard == Ready(epoch=3, plan_digest="ab")
    assert sum("dropped a frame" in record.message for record in caplog.records) == 2  # once a minute, on either side


def test_a_coordinator_that_closes_is_missed_at_once(coordinator: Coordinator, join: Callable[..., Worker]) -> None:
    worker = join(coordinator.issue_ticket("e", 1))
    worker.say_hello()
    coordinator.wait_members("e", 1, Deadline(10))
    coordinator.close()
    worker.wait(lambda: worker.lost)
    assert "the trainer closed" in worker.lost[0]


def test_members_that_were_lost_are_forgotten_with_their_engine(
    coordinator: Coordinator, join: Callable[..., Worker]
) -> None:
    """A trainer that invites an engine again and again, in vain, keeps nothing of those that left."""
    stays = join(coordinator.issue_ticket("other", 1))
    stays.say_hello(engine="other")
    coordinator.wait_members("other", 1, Deadline(10))
    for _ in range(3):
        worker = join(coordinator.issue_ticket("e", 1))
        worker.say_hello()
        coordinator.wait_members("e", 1, Deadline(10))
        worker.link.close("in vain")
        end = time.monotonic() + 10
        while coordinator.members("e") and time.monotonic() < end:
            time.sleep(0.01)
        coordinator.forget_engine("e", "gone", settled=True)
    assert [member.engine for member in coordinator._members.values()] == ["other"]


def test_waits_end_by_their_deadline(coordinator: Coordinator, join: Callable[..., Worker]) -> None:
    with pytest.raises(DeadlineExceeded, match="0 of 1 workers"):
        coordinator.wait_members("e", 1, Deadline(0.1))
    worker = join(coordinator.issue_ticket("e", 1))
    worker.say_hello()
    (member,) = coordinator.wait_members("e", 1, Deadline(10))
    with pytest.raises(DeadlineExceeded):
        coordinator.take(member, Ready, Deadline(0.1), phase="test")
    with pytest.raises(AuthError, match="elsewhere"):
        coordinator.take(member, Ready, Deadline(10), phase="test", cancelled=lambda: AuthError("elsewhere"))


def test_many_members_are_heard_on_one_thread_as_they_speak(
    coordinator: Coordinator, join: Callable[..., Worker]
) -> None:
    """Those that said it before, that say it later, that fail, that are lost, that are called off and that are late."""
    ticket = coordinator.issue_ticket("e", 6)
    workers = [join(ticket) for _ in range(6)]
    for rank, worker in enumerate(workers):
        worker.say_hello(rank, 6)
    members = coordinator.wait_members("e", 6, Deadline(10))
    links = [worker.link for worker in workers]
    links[0].send(Ready(epoch=0, plan_digest="before"))
    limit = Deadline(10)
    while not members[0].inbox:
        limit.check("the first message")
    heard: list[tuple[int, object]] = []
    deadline = Deadline(30)
    waits = coordinator.take_each(
        members,
        Ready,
        deadline,
        phase="test",
        matches=lambda said: getattr(said, "plan_digest", "") != "other",
        cancelled=lambda member: AuthError("elsewhere") if member.rank == 4 and len(heard) >= 3 else None,
    )
    for member, said in waits:
        heard.append((member.rank, said.plan_digest if isinstance(said, Ready) else type(said).__name__))
        if len(heard) == 1:
            links[1].send(Ready(epoch=0, plan_digest="other"))
            links[1].send(Ready(epoch=0, plan_digest="later"))
        elif len(heard) == 2:
            links[2].send(Failed(epoch=0, round=0, error=ErrorForm(kind="TransportError", message="no"), dirty=False))
        elif len(heard) == 3:
            links[3].close("it is tired")
        elif len(heard) == 5:
            deadline.cancel()
    assert heard[:3] == [(0, "before"), (1, "later"), (2, "TransportError")]
    assert sorted(heard[3:5]) == [(3, "WorkerLeft"), (4, "AuthError")]
    assert heard[5:] == [(5, "DeadlineExceeded")]
    assert [getattr(said, "plan_digest", None) for said in members[1].inbox] == ["other"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("address", "http://x"), ("public_key", "short"), ("public_key", "é" * 40), ("timeout_s", 0.0)],
)
def test_join_info_names_the_bad_field(field: str, value: object) -> None:
    good = {
        "address": "tcp://127.0.0.1:1",
        "public_key": zmq.curve_keypair()[0].decode(),
        "ticket": "t",
        "engine": "e",
    }
    with pytest.raises(InvalidInput) as caught:
        JoinInfo(**{**good, field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def _dismiss(coordinator: Coordinator) -> None:
    coordinator.forget(coordinator.members())
    coordinator.wait_goodbyes(20)


@pytest.mark.parametrize("leave", [lambda c: c.close(goodbye_s=20), _dismiss], ids=["close", "forget"])
def test_after_a_goodbye_every_member_knows_it(leave: Callable[[Coordinator], None]) -> None:
    coordinator = Coordinator(silence_s=5.0)
    workers = [SlowWorker(coordinator, coordinator.issue_ticket(f"e{i}", 1), engine=f"e{i}") for i in range(3)]
    try:
        for i in range(3):
            coordinator.wait_members(f"e{i}", 1, Deadline(10))
        leave(coordinator)
        assert all(len(worker.lost) == 1 and "the trainer left" in worker.lost[0] for worker in workers)
    finally:
        coordinator.close()
        for worker in workers:
            worker.link.close()


def test_a_goodbye_does_not_wait_for_a_member_whose_connection_closed(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been killed, and nobody has looked since."""
    worker = Worker(coordinator, coordinator.issue_ticket("e", 1))
    worker.say_hello()
    coordinator.wait_members("e", 1, Deadline(10))
    monkeypatch.setattr(ControlLink, "send", lambda self, message: None)  # neither goodbye nor an answer
    worker.link.close()
    coordinator.forget(coordinator.members())
    never = Deadline(60)
    coordinator.wait_goodbyes(never.timeout_s)
    assert never.remaining_s() > 30
