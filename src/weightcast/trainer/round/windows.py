"""WindowTurns: whose turn it is at each window of a streamed round: it is filled, then read by every worker that wants of it, then filled
again as another window."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError

LOOK_S = 0.1
"""How often a wait looks whether it still has a purpose."""

Reader = tuple[str, int]
"""A worker: its engine's name and its rank."""
Cause = Callable[[], WeightcastError | None]
"""Why a wait has no purpose any more; None while it has."""


class WindowTurns:
    """Windows by number, filled in that order by one thread and read by those of the ``readers``, each of the windows named.

    Windows whose numbers differ by ``slots`` are one memory. Thread-safe.
    """

    def __init__(self, slots: int = 1, readers: Mapping[Reader, Iterable[int]] = MappingProxyType({})) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._last = -1
        self._readers: dict[int, set[Reader]] = {}
        for reader, windows in readers.items():
            for window in windows:
                self._readers.setdefault(window, set()).add(reader)

    def claim(self, window: int, deadline: Deadline, cancelled: Cause) -> None:
        """Return when nobody reads the memory of a window any more, so that it can be filled."""
        before = window - self._slots
        self._wait(
            lambda: not self._readers.get(before), deadline, cancelled, "a worker to read a window of the stream"
        )

    def fill(self, window: int) -> None:
        """The window is filled."""
        with self._changed:
            self._last = max(self._last, window)
            self._changed.notify_all()

    def wait_filled(self, window: int, deadline: Deadline, cancelled: Cause) -> None:
        """Return when a window is filled."""
        self._wait(lambda: self._last >= window, deadline, cancelled, "the stream's next tensors")

    def release(self, reader: Reader, window: int) -> None:
        """The reader is through with a window."""
        with self._changed:
            self._readers.get(window, set()).discard(reader)
            self._changed.notify_all()

    def leave(self, reader: Reader) -> None:
        """The reader reads no window any more."""
        with self._changed:
            for readers in self._readers.values():
                readers.discard(reader)
            self._changed.notify_all()

    def wake(self) -> None:
        """Have waits look now whether they still have a purpose."""
        with self._changed:
            self._changed.notify_all()

    def _wait(self, is_so: Callable[[], bool], deadline: Deadline, cancelled: Cause, what: str) -> None:
        with self._changed:
            while not is_so():
                if (cause := cancelled()) is not None:
                    raise cause
                if deadline.passed:
                    raise deadline.exceeded(f"waiting for {what}")
                self._changed.wait(min(LOOK_S, deadline.remaining_s()))
