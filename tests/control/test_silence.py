"""Silence: a side that is busy is not silent, whatever its Python does; a side that is stopped is."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.processes import Child
from tests.support.tables import holdings_of

from weightcast.control import ControlLink, Coordinator, JoinInfo
from weightcast.control.coordinator import Member
from weightcast.control.pieces import cut
from weightcast.deadline import Deadline
from weightcast.errors import PeerLost
from weightcast.facts import Facts
from weightcast.manifest import Manifest
from weightcast.messages import AnyMessage, Hello, Ready, Setup, Welcome, encode

SILENCE_S = 0.8
BUSY_S = 2.4
"""For so long a side answers nothing by itself: several times the silence that is taken for a loss."""


def setup(epoch: int, nbytes: int = 0) -> Setup:
    none = holdings_of(Manifest.of([]), {})
    return Setup(epoch=epoch, holdings=replace(none, ranks=bytes(nbytes)), offers=(), timeout_s=1)


def hold_pythons_lock() -> None:
    """As a decode of a long message does: no other thread of this process runs Python meanwhile."""
    ctypes.PyDLL(None).usleep(int(BUSY_S * 1e6))


class Worker:
    """A link that notes what comes; ``busy`` is run once, by the link's thread, for the next Setup."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.heard: list[AnyMessage] = []
        self.lost: list[str] = []
        self.busy: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self.link = ControlLink(JoinInfo(**info), self._hear, self._lose)
        about = {"version": "default", "digest": "", "dirty": False, "highest": 0}
        facts = Facts(host="h", pid=os.getpid(), device="cpu")
        self.link.send(Hello(ticket=info["ticket"], engine="e", rank=0, world_size=1, facts=facts, **about))  # type: ignore[arg-type]

    def _hear(self, message: AnyMessage) -> None:
        if isinstance(message, Setup):
            busy, self.busy = self.busy, lambda: None
            busy()
        with self._changed:
            self.heard.append(message)
            self._changed.notify_all()
        if isinstance(message, Setup):
            self.link.send(Ready(epoch=message.epoch, plan_digest="p"))

    def _lose(self, reason: str) -> None:
        with self._changed:
            self.lost.append(reason)
            self._changed.notify_all()

    def wait_lost(self) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: self.lost, 20)
        return self.lost[0]

    def be_busy_with_the_next(self) -> None:
        self.busy = hold_pythons_lock

    def wait_welcome(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.heard, 20)


class Trainer:
    """A coordinator with one ticket, for a process of its own."""

    def __init__(self) -> None:
        self.coordinator = Coordinator(silence_s=SILENCE_S)
        self.coordinator.greet_with(
            lambda member: Welcome(session="s", manifest=Manifest.of([]), mode="auto", shadows=1, keep=())
        )
        self.busy: Callable[[Any], None] = lambda message: None

    def invite(self) -> dict[str, Any]:
        return {
            "address": f"tcp://127.0.0.1:{self.coordinator.port}",
            "public_key": self.coordinator.public_key,
            "ticket": self.coordinator.issue_ticket("e", 1),
            "engine": "e",
            "silence_s": SILENCE_S,
        }

    def member(self) -> Member:
        return self.coordinator.wait_members("e", 1, Deadline(20))[0]

    def be_busy(self) -> None:
        self.member()
        hold_pythons_lock()

    def ask(self, message: Setup) -> str | None:
        """The worker's answer is waited for; why the worker is lost."""
        member = self.member()
        self.coordinator.epoch = message.epoch
        self.coordinator.send(member, message)
        self.coordinator.take(member, Ready, Deadline(20), phase="test")
        return member.lost

    def close(self) -> None:
        self.coordinator.close()


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    made = Trainer()
    yield made
    made.close()


def test_a_worker_that_decodes_and_handles_for_long_is_not_silent(trainer: Trainer) -> None:
    with Child(Worker, trainer.invite()) as child:
        child.call("wait_welcome")
        child.call("be_busy_with_the_next")
        assert trainer.ask(setup(1)) is None  # the answer comes when the worker is done
        assert trainer.ask(setup(2)) is None


def test_a_trainer_that_decodes_and_handles_for_long_is_not_silent() -> None:
    with Child(Trainer) as child:
        worker = Worker(child.call("invite"))
        try:
            child.call("be_busy")
            assert child.call("ask", setup(1)) is None
            assert worker.lost == []
        finally:
            worker.link.close()


@pytest.mark.parametrize("unread_nbytes", [0, 64 * 2**20], ids=["idle", "behind what it does not read"])
def test_a_stopped_worker_is_lost_and_is_told_when_it_goes_on(trainer: Trainer, unread_nbytes: int) -> None:
    with Child(Worker, trainer.invite()) as child:
        child.call("wait_welcome")
        assert trainer.ask(setup(1)) is None
        member, pieces = trainer.member(), list(cut(encode(setup(2, unread_nbytes))))
        child.stop()
        for piece in pieces:  # before the next heartbeat, which then stands behind them
            trainer.coordinator._pump.send(member.identity, piece)
        with pytest.raises(PeerLost, match=f"silent for {SILENCE_S:g} s"):
            trainer.coordinator.take(member, Ready, Deadline(20), phase="test")
        child.go_on()
        assert "connection closed" in child.call("wait_lost")


@pytest.mark.parametrize("unread_nbytes", [0, 64 * 2**20], ids=["idle", "behind what it does not read"])
def test_a_stopped_trainer_is_lost(unread_nbytes: int) -> None:
    with Child(Trainer) as child:
        worker = Worker(child.call("invite"))
        try:
            assert child.call("ask", setup(1)) is None
            pieces = list(cut(encode(setup(2, unread_nbytes))))
            child.stop()
            for piece in pieces:
                worker.link._pump.send(piece)
            assert f"silent for {SILENCE_S:g} s" in worker.wait_lost()
        finally:
            worker.link.close()
