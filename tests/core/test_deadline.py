"""Deadline: what is left, for waits that may be over at once and for those that read zero as no limit."""

from __future__ import annotations

import math
import time

import pytest

from weightcast.deadline import LEAST_S, Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput


def test_a_deadline_that_has_passed_still_gives_a_limit() -> None:
    deadline = Deadline(0.01)
    assert 0 < deadline.remaining_s() <= 0.01
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
        assert seconds - 1 < part.timeout_s <= seconds
        assert part.at <= whole.at + LEAST_S


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf])
def test_only_a_positive_number_of_seconds_is_a_timeout(seconds: float) -> None:
    with pytest.raises(InvalidInput, match="positive number of seconds"):
        Deadline(seconds)
