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
"""A trainer that just asked an engine to join answers in milliseconds. ``welcome`` waits no longer: its caller may be the thread that
runs the engine."""
LOST_HINT = "Does the trainer still run, and are the address and the public key its own?"
PATIENCE_S, PATIENCE_SHARE = 15.0, 0.5
"""How long a wait beside the engine may take, in seconds and as a share of the trainer's deadline: where all cores are busy a
handshake takes seconds."""


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
    """Says hello when it is made, and keeps the trainer's answer until ``welcome`` takes the answer. Thread-safe."""

    def __init__(self, info: JoinInfo, identity: Identity) -> None:
        self.info, self.identity = info, identity
        self._limit = Deadline(
            max(min(info.timeout_s, GREETING_TIMEOUT_S), min(PATIENCE_S, PATIENCE_SHARE * info.timeout_s))
        )
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
        """Whether ``welcome`` would return or raise at once: the answer is there, or no answer will come."""
        with self._changed:
            return bool(self._heard) or self._limit.passed

    @property
    def has_hope(self) -> bool:
        """Whether the trainer's welcome is there, or may still come."""
        with self._changed:
            return isinstance(self._heard[0], Welcome) if self._heard else not self._limit.passed

    def wait(self, at_most_s: float | None = None) -> None:
        """Return when ``is_over`` is True, or after ``at_most_s`` seconds."""
        limit = self._limit if at_most_s is None else Deadline(min(at_most_s, self._limit.limit_s()))
        with self._changed:
            while not self._heard and not limit.passed:
                self._changed.wait(limit.limit_s())

    def welcome(self) -> Welcome:
        """Wait for the trainer's answer and return it. Raises the error with which the trainer refused, PeerLost when the trainer is
        gone, and DeadlineExceeded after GREETING_TIMEOUT_S."""
        self.wait(GREETING_TIMEOUT_S)
        with self._changed:
            if not self._heard:
                waited_s = self._limit.timeout_s - self._limit.remaining_s()
                raise DeadlineExceeded(
                    f"the trainer at {self.info.address} did not answer in {waited_s:.0f} s",
                    phase="join",
                    hint="Check that this host reaches that address and that the public key is the trainer's",
                )
            answer = self._heard.pop(0)
        if isinstance(answer, str):
            raise PeerLost(answer, phase="join", hint=LOST_HINT)
        if isinstance(answer, Refused):
            raise answer.error.error(phase="join")
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"expected a welcome, got {type(answer).__name__}", phase="join")
        return answer

    def hand_over(self, on_message: Callable[[AnyMessage], None], on_lost: Callable[[str], None]) -> None:
        """Pass all messages since the welcome, and all later ones, to these functions."""
        with self._changed:
            heard, self._heard = self._heard, []
            self._on_message, self._on_lost = on_message, on_lost
            for what in heard:
                self._pass_on(what)

    def close(self, reason: str) -> None:
        """Leave the trainer, and tell whoever waits for the trainer's answer. A second call does nothing."""
        self.link.close(reason)
        with self._changed:
            self._heard.insert(0, reason)
            self._changed.notify_all()

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
