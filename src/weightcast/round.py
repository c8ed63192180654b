"""A worker's state in a round, and the fences that make stale and repeated messages harmless. Pure.

    IDLE ─begin→ OPEN ─staged→ STAGED ─verified→ VERIFIED ─commit→ COMMITTED
                   └──────────────── abort ────────────→ ABORTED

Rounds are numbered by (epoch, round) and only ever go forward. In-place rounds skip STAGED: they are verified while OPEN,
and the copy is part of the commit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, StateError


class Phase(Enum):
    IDLE = "idle"
    OPEN = "open"
    STAGED = "staged"
    VERIFIED = "verified"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RoundId:
    """Orders rounds over epochs."""

    epoch: int
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What the coordinator said when it let a round commit."""

    version: str
    content: str
    digest: int


class WorkerRound:
    """The present round of one worker. Thread-safe; ``wait`` is the only call that blocks, and it takes a deadline."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._id = RoundId(epoch=0, round=0)
        self._phase = Phase.IDLE
        self._approval: Approval | None = None
        self._reason = ""

    @property
    def id(self) -> RoundId:
        return self._id

    @property
    def phase(self) -> Phase:
        return self._phase

    def begin(self, id: RoundId) -> bool:
        """Open a round; False when it is stale or a repetition (nothing changes then)."""
        with self._changed:
            if id <= self._id:
                return False
            self._id, self._approval, self._reason = id, None, ""
            self._to(Phase.OPEN)
            return True

    def staged(self, id: RoundId) -> bool:
        """All bytes arrived; False when the round is not open any more."""
        return self._step(id, (Phase.OPEN,), Phase.STAGED)

    def verified(self, id: RoundId, approval: Approval) -> bool:
        """The coordinator approved; False when stale or not expected."""
        with self._changed:
            if id != self._id or self._phase not in (Phase.OPEN, Phase.STAGED):
                return False
            self._approval = approval
            self._to(Phase.VERIFIED)
            return True

    def committed(self, id: RoundId) -> bool:
        return self._step(id, (Phase.VERIFIED,), Phase.COMMITTED)

    def rolled_back(self, id: RoundId) -> bool:
        return self._step(id, (Phase.COMMITTED,), Phase.ABORTED)

    def abort(self, id: RoundId, reason: str) -> bool:
        """End a round that has not committed; False when it is another, committed or already aborted."""
        with self._changed:
            if id != self._id or self._phase in (Phase.COMMITTED, Phase.ABORTED, Phase.IDLE):
                return False
            self._reason = reason
            self._to(Phase.ABORTED)
            return True

    def abort_any(self, reason: str) -> bool:
        """End whatever round is open."""
        return self.abort(self._id, reason)

    def wait_for_approval(self, id: RoundId, deadline: Deadline) -> Approval:
        """Wait until the round is verified. StateError when it is another or aborted, DeadlineExceeded when it stays out."""
        with self._changed:
            while True:
                if id != self._id:
                    raise StateError(
                        f"round {id.epoch}.{id.round} is not the present one ({self._id.epoch}.{self._id.round})"
                    )
                if self._phase in (Phase.ABORTED, Phase.IDLE):
                    raise StateError(f"round {id.epoch}.{id.round} was aborted: {self._reason or 'it never began'}")
                if self._approval is not None:
                    return self._approval
                if not self._changed.wait(deadline.remaining_s()) and deadline.passed:
                    raise DeadlineExceeded(f"no approval of round {id.epoch}.{id.round} in {deadline.timeout_s:g} s")

    def _step(self, id: RoundId, allowed: tuple[Phase, ...], target: Phase) -> bool:
        with self._changed:
            if id != self._id or self._phase not in allowed:
                return False
            self._to(target)
            return True

    def _to(self, phase: Phase) -> None:
        self._phase = phase
        self._changed.notify_all()
