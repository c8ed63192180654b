"""Member: one admitted worker, or trainer rank, in the coordinator's book."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from weightcast.control.pieces import Joiner
from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, WeightcastError, WorkerLeft
from weightcast.messages import AnyMessage, Failed, Hello, Message, RankAnswer, Refused

FRAME_NBYTES = 2**20
"""What a member may say in one message, but for the one large message that its ticket allows."""


@dataclass(slots=True, eq=False)
class Member:
    """One admitted worker. ``lost`` says why it is gone, if it is."""

    engine: str
    rank: int
    identity: bytes
    hello: Hello
    changed: threading.Condition
    """Of the coordinator's lock, like everything that changes here."""
    lost: str | None = None
    said_goodbye: bool = False
    """Lost because it left, in an orderly way."""
    inbox: list[AnyMessage] = field(default_factory=list)
    large_nbytes: int = 0
    """Bytes that its next message may have beyond FRAME_NBYTES; used up by the first that does, unless ``is_trusted``."""
    is_trusted: bool = False
    joiner: Joiner = field(default_factory=Joiner)
    on_trouble: Callable[[Failed | RankAnswer | None], None] | None = None
    """Called on the I/O thread with each Failed message and each answer that failed, and with None when the member is lost; must
    not block."""
    on_news: Callable[[Member], None] | None = None
    """Called with the member when it has said something or is lost: for one that waits for many members. Must not block."""

    def lose(self, reason: str, *, said_goodbye: bool = False) -> None:
        if self.lost is None:
            self.lost, self.said_goodbye = reason, said_goodbye
            if self.on_trouble is not None:
                self.on_trouble(None)
            self.tell()

    def gone(self, phase: str | None = None) -> PeerLost:
        """The error of a worker that is lost."""
        kind = WorkerLeft if self.said_goodbye else PeerLost
        return kind(f"the worker is gone: {self.lost}", engine=self.engine, worker=self.rank, phase=phase)

    def tell(self) -> None:
        """Wake those that wait for this member, and nobody else: a fleet has thousands."""
        self.changed.notify_all()
        if self.on_news is not None:
            self.on_news(self)

    def allow(self) -> int:
        """How long its next frame may be."""
        return max(FRAME_NBYTES, self.large_nbytes)

    def hear(self, piece: bytes) -> bytes | None:
        """The frame that this piece ends. ProtocolError for what is no frame, or is longer than is due."""
        frame = self.joiner.add(piece, self.allow())
        if frame is not None and len(frame) > FRAME_NBYTES and not self.is_trusted:
            self.large_nbytes = 0
        return frame

    @property
    def key(self) -> tuple[str, int]:
        return self.engine, self.rank

    def said(
        self, wanted: type[Message], matches: Callable[[Message], bool], phase: str
    ) -> Message | WeightcastError | None:
        """A message of this kind, taken out of the inbox, or why none will come; None while that is open. Needs the lock."""
        for i, message in enumerate(self.inbox):
            if isinstance(message, Refused) or (isinstance(message, Failed) and matches(message)):
                del self.inbox[i]
                return message.error.error(engine=self.engine, worker=self.rank).at(phase=phase)
            if isinstance(message, wanted) and matches(message):
                del self.inbox[i]
                return message
        return None if self.lost is None else self.gone(phase)

    def late(self, deadline: Deadline, phase: str) -> WeightcastError | None:
        """What to say of it when the deadline has passed."""
        if not deadline.passed:
            return None
        told = f"no answer in {deadline.timeout_s:g} s"
        return deadline.exceeded("waiting for its answer", told, engine=self.engine, worker=self.rank, phase=phase)


def drained(news: queue.SimpleQueue[Member], timeout_s: float) -> list[Member]:
    """All members that have news, once one has; none when that takes longer."""
    found: list[Member] = []
    with contextlib.suppress(queue.Empty):
        found.append(news.get(timeout=timeout_s))
        while True:
            found.append(news.get_nowait())
    return found
