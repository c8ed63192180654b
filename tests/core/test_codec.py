"""Which of two ways a worker's bytes go: what was measured decides, and what was chosen is said with its reason."""

from __future__ import annotations

import pytest

from weightcast.trainer.fleet.codec import AGAIN, FAST_BYTES_S, Codec

NBYTES = 10**9


def rounds(codec: Codec, count: int, values_s: float, changes_s: float) -> list[bool]:
    """Which of so many rounds sent changes, where all values and changes take so long."""
    chosen = []
    for _ in range(count):
        codec.choose()
        codec.sent_nbytes = 10**7 if codec.changes else NBYTES
        codec.note(NBYTES, changes_s if codec.changes else values_s)
        chosen.append(codec.changes)
    return chosen


def test_a_slow_link_is_measured_and_then_gets_changes() -> None:
    codec = Codec(wish="auto")
    assert rounds(codec, 6, values_s=8.0, changes_s=0.4) == [False, False, True, True, True, True]
    assert codec.reason == "all values take 8 s (0.125 GB/s), changes 0.4 s (10000000 bytes)"


def test_nothing_is_kept_for_a_fast_link() -> None:
    codec = Codec(wish="auto")
    for _ in range(AGAIN + 5):
        assert rounds(codec, 1, values_s=NBYTES / FAST_BYTES_S / 1.5, changes_s=0.1) == [False]
        assert not codec.is_kept
    assert codec.reason.endswith("as fast as changes are found")


def test_changes_that_take_longer_are_given_up_and_tried_again_now_and_then() -> None:
    codec = Codec(wish="auto")
    chosen = rounds(codec, 3 * AGAIN, values_s=1.0, changes_s=1.5)
    assert chosen[:4] == [False, False, True, False]
    assert 2 <= sum(chosen) <= 4


def test_a_link_that_becomes_slow_gets_changes() -> None:
    codec = Codec(wish="auto")
    assert not any(rounds(codec, 5, values_s=0.1, changes_s=0.4))
    assert rounds(codec, 4, values_s=8.0, changes_s=0.4) == [False, False, True, True]


@pytest.mark.parametrize(
    ("wish", "refused", "reason"), [(True, "shm brings all values", "shm brings all values"), (False, "", "")]
)
def test_all_values_where_nothing_else_is_asked_for_or_can_be(wish: bool, refused: str, reason: str) -> None:
    codec = Codec(wish=wish, refused=refused)
    assert not any(rounds(codec, 3, values_s=8.0, changes_s=0.1))
    assert codec.reason == reason
    assert not codec.is_kept


def test_the_first_round_of_a_pair_has_nothing_to_tell_changes_against() -> None:
    codec = Codec(wish=True)
    assert rounds(codec, 3, values_s=0.1, changes_s=5.0) == [False, True, True]


def test_a_round_whose_changes_are_no_shorter_is_told_as_one_of_all_values() -> None:
    codec = Codec(wish=True)
    rounds(codec, 1, values_s=1.0, changes_s=1.0)
    assert codec.as_sent() == ("dense", "the worker holds nothing that changes could be told against")
    for sent, told in (
        (NBYTES, ("dense", "the changes are no shorter than all values")),
        (NBYTES - 1, ("delta", "delta=True")),
    ):
        codec.choose()
        codec.sent_nbytes = sent
        codec.note(NBYTES, 1.0)
        assert codec.as_sent() == told


@pytest.mark.parametrize("factor", [1.05, 2.0, 5.0, 20.0])
def test_trying_changes_again_costs_two_in_a_hundred_at_most(factor: float) -> None:
    """A round that keeps what it sends, as one before changes does, takes half as long again."""
    codec = Codec(wish="auto")
    rounds(codec, 3, values_s=1.0, changes_s=factor)
    count, took, tried = 100 * AGAIN, 0.0, 0
    for _ in range(count):
        codec.choose()
        codec.sent_nbytes = 10**7 if codec.changes else NBYTES
        seconds = factor if codec.changes else 1.5 if codec.is_kept else 1.0
        codec.note(NBYTES, seconds)
        took, tried = took + seconds, tried + codec.changes
    assert tried
    assert took <= 1.02 * count


def test_looking_for_changes_before_they_travel_counts_as_their_time() -> None:
    """A worker that is written in place measures only what its commit waits for."""
    codec = Codec(wish="auto")
    chosen = []
    for _ in range(6):
        codec.choose()
        codec.looked_s = 2.0 if codec.changes else 0.0
        codec.note(NBYTES, 0.1 if codec.changes else 1.0)
        chosen.append(codec.changes)
    assert chosen == [False, False, True, False, False, False]
