"""Deadline: what is left, for waits that may be over at once and for those that read zero as no limit."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future

import pytest

from weightcast.deadline import LEAST_S, Deadline, result_within
from weightcast.errors import DeadlineExceeded, InvalidInput


def test_a_deadline_that_has_passed_still_gives_a_limit() -> None:
    deadline = Deadline(0.01)
    assert deadline.remaining_s() <= 0.01
    time.sleep(0.02)
    assert deadline.remaining_s() == 0.0
    assert deadline.limit_s() == deadline.limit().total_seconds() == LEAST_S
    assert deadline.part(0.5).timeout_s == LEAST_S
    assert deadline.passed
    with pytest.raises(DeadlineExceeded, match=r"the wait took longer than 0\.01 s"):
        deadline.check("the wait")


def test_a_part_ends_within_the_whole() -> None:
    whole = Deadline(100.0)
    for part, seconds in (
        (whole.part(), 100.0),
        (whole.part(0.25), 25.0),
        (whole.part(at_most_s=3.0), 3.0),
        (whole.part(0.25, at_most_s=50.0), 25.0),
        (whole.part(0.25, at_most_s=2.0), 2.0),
    ):
        assert seconds / 2 < part.timeout_s <= seconds
        assert part.at <= whole.at + LEAST_S


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf])
def test_only_a_positive_number_of_seconds_is_a_timeout(seconds: float) -> None:
    with pytest.raises(InvalidInput, match="positive number of seconds"):
        Deadline(seconds)


def test_a_part_that_is_all_of_the_rest_ends_with_the_whole() -> None:
    whole = Deadline(30.0)
    time.sleep(0.01)
    part = whole.part()
    assert (part.at, part.timeout_s) == (whole.at, 30.0)


def test_cancelling_ends_a_deadline_and_its_parts_and_nothing_around_it() -> None:
    whole = Deadline(100.0)
    first, second = whole.part(), whole.part(0.5)
    inner = first.part(at_most_s=3.0)
    first.cancel()
    first.cancel()
    for deadline in (first, inner, first.part(), inner.part(0.5)):
        assert deadline.cancelled
        assert deadline.passed
        assert deadline.remaining_s() == 0.0
        assert deadline.limit_s() == LEAST_S
        with pytest.raises(DeadlineExceeded, match="the wait was called off"):
            deadline.check("the wait")
    for deadline in (whole, second):
        assert not deadline.cancelled
        assert not deadline.passed
        deadline.check("the wait")


def test_cancelling_wakes_who_waits_for_a_part_and_who_comes_later() -> None:
    whole = Deadline(100.0)
    woken: list[str] = []
    with whole.part().part(0.5).waking(lambda: woken.append("inside")):
        with whole.part().waking(lambda: woken.append("outside")):
            assert woken == []
        whole.cancel()
    assert woken == ["inside"]
    with whole.part().waking(lambda: woken.append("late")):
        assert woken == ["inside", "late"]
    whole.cancel()
    assert woken == ["inside", "late"]


def test_a_wait_for_a_future_ends_by_result_deadline_or_cancel() -> None:
    future: Future[int] = Future()

    def wait(deadline: Deadline) -> int:
        return result_within(future, deadline, lambda: KeyError("late"))

    with pytest.raises(KeyError, match="late"):
        wait(Deadline(0.01))
    deadline = Deadline(600.0)
    threading.Timer(0.05, deadline.cancel).start()
    with pytest.raises(KeyError, match="late"):
        wait(deadline.part(0.5))
    threading.Timer(0.05, future.set_result, (7,)).start()
    assert wait(Deadline(600.0)) == 7
    assert wait(deadline) == 7
    future = Future()
    future.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="own"):
        wait(Deadline(600.0))
