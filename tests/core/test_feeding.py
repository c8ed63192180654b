"""Feeding: "auto" tries both ways, keeps the one that takes less time, and lets one slow round decide nothing. Times are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from weightcast.trainer.fleet.feeding import AGAIN, Feeding

NBYTES = 10**9
Takes = Callable[[bool], float]


def takes(direct_s: float, fed_s: float) -> Takes:
    """How long a round takes, by whether workers feed each other."""
    return lambda is_on: fed_s if is_on else direct_s


def play(feeding: Feeding, seconds: Takes, rounds: int) -> list[bool]:
    """Which way each round went."""
    ways = []
    for _ in range(rounds):
        feeding.choose()
        ways.append(feeding.is_on)
        feeding.note(NBYTES, seconds(feeding.is_on))
    return ways


def measured() -> Feeding:
    return Feeding(8, is_measured=True)


def test_relays_that_are_faster_are_used_once_both_ways_were_measured() -> None:
    feeding = measured()
    assert play(feeding, takes(8.0, 1.1), 10) == [False, False, *[True] * 8]
    assert feeding.reason == "the trainer takes 8 s for all engines of the site (0.125 GB/s), relays 1.1 s"


@pytest.mark.parametrize("fed_s", [8.1, 7.5, 100.0])
def test_relays_that_are_hardly_faster_are_tried_and_left(fed_s: float) -> None:
    assert play(measured(), takes(8.0, fed_s), 10) == [False, False, True, True, *[False] * 6]


def test_a_fast_trainer_tries_no_relays() -> None:
    feeding = measured()
    assert not any(play(feeding, takes(0.5, 0.1), 3 * AGAIN))
    assert "too fast for relays to pay" in feeding.reason


def test_sites_that_a_user_names_are_not_measured() -> None:
    feeding = Feeding(2, is_measured=False)
    assert all(play(feeding, takes(1.0, 50.0), 10))
    assert feeding.reason == ""


def test_the_first_round_of_new_pairs_does_not_count() -> None:
    feeding = measured()
    first = iter([900.0])
    play(feeding, lambda is_on: next(first, 8.0) if not is_on else 1.0, 4)
    assert play(feeding, takes(8.0, 1.0), 3) == [True] * 3
    feeding.renew()
    assert play(feeding, takes(8.0, 900.0), 1) == [True]
    assert play(feeding, takes(8.0, 1.0), 5) == [True] * 5


def test_one_slow_round_decides_nothing_and_a_link_that_has_changed_does() -> None:
    feeding = measured()
    play(feeding, takes(8.0, 1.0), 8)
    assert play(feeding, takes(8.0, 60.0), 1) == [True]
    assert play(feeding, takes(8.0, 1.0), 3) == [True] * 3
    assert play(feeding, takes(8.0, 60.0), 4) == [True, True, False, False]


@pytest.mark.parametrize(("direct_s", "fed_s", "after"), [(8.0, 7.9, AGAIN), (1.0, 3.0, 3 * AGAIN)])
def test_the_other_way_is_tried_again_now_and_then(direct_s: float, fed_s: float, after: int) -> None:
    feeding = measured()
    assert play(feeding, takes(direct_s, fed_s), 4) == [False, False, True, True]
    assert not any(play(feeding, takes(direct_s, fed_s), after))
    assert play(feeding, takes(direct_s, fed_s), 2) == [True, False]
    assert "relays" in feeding.reason


def test_the_way_that_was_left_comes_back_once_it_is_faster() -> None:
    feeding = measured()
    play(feeding, takes(8.0, 20.0), 4)
    ways = play(feeding, takes(8.0, 1.0), 6 * AGAIN)
    tries: Sequence[int] = [number for number, way in enumerate(ways) if way]
    assert tries
    assert all(ways[-AGAIN:])
