"""Faults of the machine: a full disk, a clock that jumps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from tests.trials.matrix.field import Field
from tests.trials.matrix.outcome import Finding

MakeField = Callable[..., Field]
DAY_S = 86400.0


def disk_full(make: MakeField) -> Finding:
    with make() as field:
        field.start(log="/dev/full")
        field.heal()
        field.a.arm("transfer:end", "corrupt")
        failure = field.fail(field.unhurried_s)
        field.steady_after(failure)
        return Finding("published; a warning in the log")


def clock_jumps(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        for seconds in (DAY_S, -2 * DAY_S):
            field.a.call("jump_clock", seconds)
            with jumped_clock(-seconds):
                field.succeed(field.unhurried_s)
        return Finding("published")


@contextlib.contextmanager
def jumped_clock(seconds: float) -> Iterator[None]:
    """The wall clock of this process jumps for a while."""
    real = time.time
    time.time = lambda: real() + seconds
    try:
        yield
    finally:
        time.time = real
