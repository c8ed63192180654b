"""Greeting: a worker's first words with a trainer, hello and welcome. Nothing of them needs the thread that runs the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from weightcast.control.link import ControlLink, JoinInfo
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, ProtocolError
from weightcast.facts import Facts
from weightcast.messages import AnyMessage, Hello, Refused, Welcome

GREETING_TIMEOUT_S = 5.0
"""A trainer that just asked an engine to join answers in milliseconds. Who joins without having waited beside the engine waits
on its thread."""


@dataclass(slots=True, kw_only=True)
class Identity:
    """Who a worker is when it says hello."""

    rank: int
    world_size: int
    facts: Facts
    version: str
    digest: str
    dirty: bool
    highest: int


class Greeting:
    """Says hello when it is made, and keeps what is answered until somebody ``welcome``s it. Thread-safe."""

    def __init__(self, info: JoinInfo, identity: Identity) -> None:
        self.info, self.identity = info, identity
        self._limit = Deadline(min(info.timeout_s, GREETING_TIMEOUT_S))
        self._changed = threading.Condition()
        self._heard: list[AnyMessage | str] = []
        """Messages, and the reason of a loss, that nobody has taken yet."""
        self._on_message: Callable[[AnyMessage], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self.link = ControlLink(info, self._hear, self._hear)
        self.link.send(
            Hello(
                ticket=info.ticket,
                engine=info.engine,
                rank=identity.rank,
                world_size=identity.world_size,
                facts=identity.facts,
                version=identity.version,
                digest=identity.digest,
                dirty=identity.dirty,
                highest=identity.highest,
            )
        )

    def is_over(self) -> bool:
        """Whether ``welcome`` would wait no longer: the answer is there, or it will not come."""
        with self._changed:
            return bool(self._heard) or self._limit.passed

    def wait(self) -> None:
        """Return when ``is_over``: after GREETING_TIMEOUT_S at the latest."""
        with self._changed:
            while not self._heard and not self._limit.passed:
                self._changed.wait(self._limit.limit_s())

    def welcome(self) -> Welcome:
        """The trainer's answer, waited for. Raises the error that it refused with, PeerLost when it is gone, or DeadlineExceeded."""
        self.wait()
        with self._changed:
            if not self._heard:
                raise DeadlineExceeded(
                    f"the trainer at {self.info.address} did not answer in {self._limit.timeout_s:g} s",
                    phase="join",
                    hint="Check that this host reaches that address and that the public key is the trainer's",
                )
            answer = self._heard.pop(0)
        if isinstance(answer, str):
            raise PeerLost(answer, phase="join")
        if isinstance(answer, Refused):
            raise answer.error.error(phase="join")
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"expected a welcome, got {type(answer).__name__}", phase="join")
        return answer

    def hand_over(self, on_message: Callable[[AnyMessage], None], on_lost: Callable[[str], None]) -> None:
        """Have these told what comes from now on, and what came since the welcome."""
        with self._changed:
            heard, self._heard = self._heard, []
            self._on_message, self._on_lost = on_message, on_lost
            for what in heard:
                self._pass_on(what)

    def close(self, reason: str) -> None:
        """Leave the trainer; idempotent."""
        self.link.close(reason)

    def _hear(self, what: AnyMessage | str) -> None:
        with self._changed:
            if self._on_message is None:
                self._heard.append(what)
                self._changed.notify_all()
                return
        self._pass_on(what)

    def _pass_on(self, what: AnyMessage | str) -> None:
        assert self._on_message is not None
        assert self._on_lost is not None
        if isinstance(what, str):
            self._on_lost(what)
        else:
            self._on_message(what)
