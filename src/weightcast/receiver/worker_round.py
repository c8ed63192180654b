"""A worker's state in a round, and the fences that make stale and repeated messages harmless. Pure.

    IDLE ─begin→ OPEN ─staged→ STAGED ─verified→ VERIFIED ─claim→ COMMITTING ─committed→ COMMITTED
                   └─────────── abort, fence, expiry ──────→ ABORTED ←failed┘               │ fence
                                                                ↑                           ↓
                                                                └─ rolled back, failed ─ ROLLING_BACK

Rounds are numbered by (epoch, round) and only ever go forward. In-place rounds skip STAGED: they are verified while OPEN,
and the copy is part of the commit. From the claim on only the commit's own outcome ends a round: an abort that comes then
asks it to stop receiving and changes no state, so the phase always says what is live. No round begins while another one
is being committed or rolled back: its bytes would land in the very memory that is being exchanged.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum

from weightcast.deadline import Deadline
from weightcast.errors import StateError


class Phase(Enum):
    IDLE = "idle"
    OPEN = "open"
    STAGED = "staged"
    VERIFIED = "verified"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ROLLING_BACK = "rolling back"
    ABORTED = "aborted"


_UNCLAIMED = (Phase.OPEN, Phase.STAGED, Phase.VERIFIED)
_IN_EXCHANGE = (Phase.COMMITTING, Phase.ROLLING_BACK)
"""The engine's thread is at the memory that a round writes."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RoundId:
    """Orders rounds over epochs."""

    epoch: int
    round: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.round}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What the coordinator said when it let a round commit."""

    version: str
    content: str
    digest: int


class WorkerRound:
    """The present round of one worker. Thread-safe. ``wait_for_approval`` is the only call that blocks, and takes a deadline."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._id = RoundId(epoch=0, round=0)
        self._phase = Phase.IDLE
        self._approval: Approval | None = None
        self._reason = ""
        self._stopping = False
        self._expiry: Deadline | None = None

    @property
    def id(self) -> RoundId:
        return self._id

    @property
    def phase(self) -> Phase:
        return self._phase

    def begin(self, id: RoundId, expiry: Deadline | None = None) -> bool:
        """Open a round. Returns False, and changes nothing, when the round is stale or a repetition, or when another round is being
        committed or rolled back.

        A round that no commit has claimed by ``expiry`` cannot be claimed any more, because the trainer has given the round up.
        """
        with self._changed:
            if id <= self._id or self._phase in _IN_EXCHANGE:
                return False
            self._enter(id, Phase.OPEN, "")
            self._expiry = expiry
            return True

    def staged(self, id: RoundId) -> bool:
        """Note that all bytes arrived. Returns False when the round is not open any more."""
        return self._step(id, (Phase.OPEN,), Phase.STAGED)

    def verified(self, id: RoundId, approval: Approval) -> bool:
        """Note the coordinator's approval. Returns False when the approval is stale or not expected."""
        with self._changed:
            if id != self._id or self._phase not in (Phase.OPEN, Phase.STAGED):
                return False
            self._approval = approval
            self._to(Phase.VERIFIED)
            return True

    def wait_for_approval(self, id: RoundId, deadline: Deadline, version: str = "") -> Approval:
        """Wait until the round is verified, and claim the round for a commit.

        The round may not have begun yet, because the order to commit can overtake the control channel. StateError when the round is
        stale, aborted or expired, or was approved as another version than the given one (empty: any). DeadlineExceeded when no approval
        comes.
        """
        with deadline.waking(self._wake), self._changed:
            while True:
                if id < self._id:
                    raise StateError(f"round {id} is not the present one ({self._id})")
                if id == self._id:
                    self._check_claimable(id, version)
                    if self._phase is Phase.VERIFIED and self._approval is not None:
                        self._to(Phase.COMMITTING)
                        return self._approval
                if deadline.passed:
                    raise deadline.exceeded(
                        "waiting for an approval", f"no approval of round {id} in {deadline.timeout_s:g} s"
                    )
                self._changed.wait(deadline.remaining_s())

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check_claimable(self, id: RoundId, version: str) -> None:
        if self._phase not in _UNCLAIMED:
            why = f": {self._reason}" if self._phase is Phase.ABORTED and self._reason else ""
            raise StateError(f"round {id} was {self._phase.value}{why}")
        if self._expiry is not None and self._expiry.passed:
            self._reason = "its time is over"
            self._to(Phase.ABORTED)
            raise StateError(f"round {id} was aborted: its {self._expiry.timeout_s:g} s are over")
        if self._approval is not None and version and version != self._approval.version:
            raise StateError(f"round {id} is approved as {self._approval.version}, not as {version}")

    def committed(self, id: RoundId) -> bool:
        return self._step(id, (Phase.COMMITTING,), Phase.COMMITTED)

    def failed(self, id: RoundId, reason: str) -> bool:
        """Note that the commit, or the roll-back, did not succeed."""
        with self._changed:
            if id != self._id or self._phase not in _IN_EXCHANGE:
                return False
            self._reason = reason
            self._to(Phase.ABORTED)
            return True

    def rolled_back(self, id: RoundId) -> bool:
        """Note that the version before the round is live again."""
        return self._step(id, (Phase.ROLLING_BACK,), Phase.ABORTED)

    def abort(self, id: RoundId, reason: str) -> bool:
        """End a round that no commit has claimed. Returns False when the present round is another one, or is over. A round that is
        being committed is asked to stop receiving (``stops``), and ends as its commit ends."""
        with self._changed:
            if id != self._id:
                return False
            if self._phase is Phase.COMMITTING:
                self._stopping = True
            if self._phase not in _UNCLAIMED:
                return False
            self._reason = reason
            self._to(Phase.ABORTED)
            return True

    def abort_any(self, reason: str) -> bool:
        """End the open round, whichever it is."""
        return self.abort(self._id, reason)

    def fence(self, id: RoundId, reason: str, *, reversible: bool = False) -> Phase:
        """Make sure that a round which is not live never becomes live, even when the round has not begun yet. Returns the round's phase
        afterwards.

        A live round that is ``reversible`` is ROLLING_BACK afterwards, until ``rolled_back`` or ``failed`` is called; the caller takes
        the round back. StateError when the round is older than the present one.
        """
        with self._changed:
            if id < self._id:
                raise StateError(f"round {id} is not the present one ({self._id})")
            if id > self._id:
                if self._phase in _IN_EXCHANGE:
                    raise StateError(f"round {self._id} is {self._phase.value}")
                self._enter(id, Phase.ABORTED, reason)
            elif self._phase in _UNCLAIMED:
                self._reason = reason
                self._to(Phase.ABORTED)
            elif self._phase is Phase.COMMITTED and reversible:
                self._to(Phase.ROLLING_BACK)
            return self._phase

    def may_return_s(self) -> float:
        """Return for how many seconds the present round may still be taken back: its trainer gives the round up when the round's time
        is over."""
        with self._changed:
            return 0.0 if self._expiry is None else self._expiry.remaining_s()

    def stops(self, id: RoundId) -> bool:
        """Whether a transfer for this round has no more purpose."""
        return id != self._id or self._stopping or self._phase in (Phase.ABORTED, Phase.IDLE)

    def _enter(self, id: RoundId, phase: Phase, reason: str) -> None:
        self._id, self._approval, self._reason = id, None, reason
        self._stopping, self._expiry = False, None
        self._to(phase)

    def _step(self, id: RoundId, allowed: tuple[Phase, ...], target: Phase) -> bool:
        with self._changed:
            if id != self._id or self._phase not in allowed:
                return False
            self._to(target)
            return True

    def _to(self, phase: Phase) -> None:
        self._phase = phase
        self._changed.notify_all()
