"""Deadline: one clock for a whole call, however many waits it has."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from weightcast.errors import DeadlineExceeded, InvalidInput

LEAST_S = 0.001


class Deadline:
    """A moment on the monotonic clock (wall-clock jumps do not move it). Pass it on; never restart it."""

    __slots__ = ("at", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        if not math.isfinite(timeout_s) or timeout_s <= 0:
            raise InvalidInput(f"a timeout is a positive number of seconds, not {timeout_s!r}", field="timeout_s")
        self.timeout_s = timeout_s
        self.at = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    def limit_s(self) -> float:
        """Seconds left, at least a millisecond: for libraries, which read zero as 'no limit', and for other processes."""
        return max(self.remaining_s(), LEAST_S)

    def limit(self) -> timedelta:
        """``limit_s`` for libraries that take it in this form."""
        return timedelta(seconds=self.limit_s())

    def part(self, share: float = 1.0, *, at_most_s: float = math.inf) -> Deadline:
        """A deadline within this one: after a share of the time left, and no more than so many seconds."""
        return Deadline(min(max(share * self.remaining_s(), LEAST_S), at_most_s))

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at

    def check(self, waiting_for: str) -> None:
        """Raise DeadlineExceeded when the moment has passed."""
        if self.passed:
            raise DeadlineExceeded(f"{waiting_for} took longer than {self.timeout_s:g} s")
