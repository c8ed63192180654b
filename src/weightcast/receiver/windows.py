"""Windows: which windows of a streamed round the trainer has filled, as far as a worker was told."""

from __future__ import annotations

import threading
from collections.abc import Callable

from weightcast.deadline import Deadline
from weightcast.receiver.worker_round import RoundId

LOOK_S = 0.1
"""How often a wait looks whether it still has a purpose."""


class FilledWindows:
    """The control link's thread notes windows, and the receiving thread waits for them. The trainer fills windows in the order of their
    numbers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._round = RoundId(epoch=0, round=0)
        self._last = -1

    def note(self, id: RoundId, window: int) -> None:
        """Note that a window of this round is filled. A note of an older round changes nothing."""
        with self._changed:
            if id > self._round:
                self._round, self._last = id, -1
            if id == self._round:
                self._last = max(self._last, window)
            self._changed.notify_all()

    def wait(self, id: RoundId, window: int, deadline: Deadline, check: Callable[[], None]) -> None:
        """Return when a window is filled. ``check`` is called while waiting, and may raise to end the wait."""
        with self._changed:
            while self._round != id or self._last < window:
                check()
                if deadline.passed:
                    raise deadline.exceeded(
                        "waiting for a window",
                        f"window {window} of the stream did not come in {deadline.timeout_s:g} s",
                    )
                self._changed.wait(min(LOOK_S, deadline.remaining_s()))

    def wake(self) -> None:
        """Have each wait call its ``check`` now."""
        with self._changed:
            self._changed.notify_all()
