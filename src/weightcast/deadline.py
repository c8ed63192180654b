"""Deadline: one clock for a whole call, however many waits it has, and the way to call all of them off."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Annotated, Any, TypeVar

import msgspec

from weightcast.errors import DeadlineExceeded, InvalidInput
from weightcast.quoted import NAME_CHARACTERS, quoted

T = TypeVar("T")
LEAST_S = 0.001
MOST_S = 1e9
"""The longest timeout, thirty years: system calls refuse longer waits."""
CALLED_OFF_HINT = "The publisher is being closed, or the engine is gone: nothing is left to wait for"
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MOST_S)]
"""A duration on a wire. Finite, and not negative: what a peer says goes into reports and metrics as it is."""


def is_seconds(value: object) -> bool:
    """Whether a value of the user's is a number of seconds that ends: positive, and no more than MOST_S."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= MOST_S


class Deadline:
    """A moment on the monotonic clock (wall-clock jumps do not move it). Pass it on; never restart it.

    A deadline that was cancelled has passed, and so have its parts. A wait hears that when it looks at the deadline again: it
    looks every fraction of a second, or is inside ``waking``.
    """

    __slots__ = ("_is_cancelled", "_parent", "_wakes", "at", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        if not is_seconds(timeout_s):
            raise InvalidInput(
                f"a timeout is a positive number of seconds, at most {MOST_S:g}, not {quoted(repr(timeout_s), NAME_CHARACTERS)}",
                field="timeout_s",
            )
        self.timeout_s = timeout_s
        self.at = time.monotonic() + timeout_s
        self._parent: Deadline | None = None
        self._is_cancelled = False
        self._wakes: list[Callable[[], None]] = []

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return 0.0 if self.cancelled else max(0.0, self.at - time.monotonic())

    def limit_s(self) -> float:
        """Seconds left, at least a millisecond: for libraries, which read zero as 'no limit', and for other processes."""
        return max(self.remaining_s(), LEAST_S)

    def limit(self) -> timedelta:
        """``limit_s`` for libraries that take it in this form."""
        return timedelta(seconds=self.limit_s())

    def part(self, share: float = 1.0, *, at_most_s: float = math.inf) -> Deadline:
        """A deadline within this one: after a share of the time left, and no more than so many seconds."""
        left_s = self.remaining_s()
        part = Deadline(min(max(share * left_s, LEAST_S), at_most_s))
        if share == 1.0 and left_s < at_most_s:
            part.at, part.timeout_s = self.at, self.timeout_s  # errors name what the caller gave
        part._parent = self
        return part

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at or self.cancelled

    def check(self, waiting_for: str) -> None:
        """Raise DeadlineExceeded when the moment has passed."""
        if self.passed:
            raise self.exceeded(waiting_for)

    def exceeded(
        self, waiting_for: str, late: str | None = None, *, hint: str | None = None, **about: Any
    ) -> DeadlineExceeded:
        """What to raise where waiting ended before there was a result. ``late`` and ``hint`` are for what took too long, and say nothing of
        what was called off; ``about`` says where that was, as errors have it."""
        if self.cancelled:
            return DeadlineExceeded(f"{waiting_for} was called off", hint=CALLED_OFF_HINT, **about)
        return DeadlineExceeded(late or f"{waiting_for} took longer than {self.timeout_s:g} s", hint=hint, **about)

    # -- calling off

    @property
    def cancelled(self) -> bool:
        return self._is_cancelled or (self._parent is not None and self._parent.cancelled)

    def cancel(self) -> None:
        """End every wait for this deadline and its parts, on whatever threads; from any thread, idempotent."""
        self._is_cancelled = True
        for wake in tuple(self._wakes):
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, ``cancel`` calls ``wake``, also when it comes or came at the same moment.

        ``wake`` makes a wait that is inside look at the deadline again. It may be called more than once, and must not block.
        """
        lineage = list(self._lineage())
        for deadline in lineage:
            deadline._wakes.append(wake)
        try:
            # A cancel that missed the entries above had set its mark before.
            if self.cancelled:
                wake()
            yield
        finally:
            for deadline in lineage:
                deadline._wakes.remove(wake)

    def _lineage(self) -> Iterator[Deadline]:
        deadline: Deadline | None = self
        while deadline is not None:
            yield deadline
            deadline = deadline._parent


def result_within(future: Future[T], deadline: Deadline, late: Callable[[], Exception]) -> T:
    """The future's result; raises what ``late`` makes when it is not done by the deadline, or the deadline was cancelled."""
    over = threading.Event()
    future.add_done_callback(lambda _: over.set())
    with deadline.waking(over.set):
        over.wait(deadline.limit_s())
    if not future.done():
        raise late()
    return future.result()
