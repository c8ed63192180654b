"""The round's states and fences: only forward, each step once, whatever order messages come in."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, StateError
from weightcast.receiver.worker_round import Approval, Phase, RoundId, WorkerRound

APPROVAL = Approval(version="1-ab", content="cd", digest=7)


def id_of(round: int, epoch: int = 1) -> RoundId:
    return RoundId(epoch=epoch, round=round)


def test_the_way_of_a_staged_round_and_back() -> None:
    state, id = WorkerRound(), id_of(1)
    assert state.begin(id)
    assert not state.begin(id)
    assert not state.committed(id)
    assert state.staged(id)
    assert not state.staged(id)
    assert state.verified(id, APPROVAL)
    assert state.wait_for_approval(id, Deadline(1)) is APPROVAL
    assert state.committed(id)
    assert not state.abort(id, "too late")
    assert not state.rolled_back(id)
    assert state.fence(id, "back") is Phase.COMMITTED
    assert state.fence(id, "back", reversible=True) is Phase.ROLLING_BACK
    assert state.rolled_back(id)
    assert not state.rolled_back(id)
    assert state.begin(id_of(2))


@pytest.mark.parametrize("ends_well", [True, False])
def test_no_round_begins_while_another_one_is_taken_back(ends_well: bool) -> None:
    state, id = WorkerRound(), id_of(1)
    state.begin(id)
    state.staged(id)
    state.verified(id, APPROVAL)
    state.wait_for_approval(id, Deadline(1))
    state.committed(id)
    state.fence(id, "back", reversible=True)
    assert not state.begin(id_of(2))
    with pytest.raises(StateError, match="rolling back"):
        state.fence(id_of(2), "never")
    assert not state.stops(id)
    assert state.rolled_back(id) if ends_well else state.failed(id, "it broke off")
    assert state.fence(id, "again", reversible=True) is Phase.ABORTED
    assert state.begin(id_of(2))


def test_stale_rounds_change_nothing() -> None:
    state = WorkerRound()
    assert state.begin(id_of(5, epoch=2))
    for stale in (id_of(4, epoch=2), id_of(9, epoch=1)):
        assert not state.begin(stale)
        assert not state.staged(stale)
        assert not state.verified(stale, APPROVAL)
        assert not state.abort(stale, "old news")
        with pytest.raises(StateError, match="not the present one"):
            state.wait_for_approval(stale, Deadline(1))
    assert state.phase is Phase.OPEN


def test_waiting_ends_by_deadline_by_abort_and_by_approval() -> None:
    state, id = WorkerRound(), id_of(1)
    state.begin(id)
    with pytest.raises(DeadlineExceeded):
        state.wait_for_approval(id, Deadline(0.05))
    threading.Timer(0.05, state.abort, (id, "the trainer said so")).start()
    with pytest.raises(StateError, match="the trainer said so"):
        state.wait_for_approval(id, Deadline(10))
    state.begin(id_of(2))
    threading.Timer(0.05, state.verified, (id_of(2), APPROVAL)).start()
    assert state.wait_for_approval(id_of(2), Deadline(10)) is APPROVAL


STEPS = ("begin", "staged", "verified", "committed", "rolled_back", "abort")
RANK = {
    Phase.IDLE: 0,
    Phase.OPEN: 1,
    Phase.STAGED: 2,
    Phase.VERIFIED: 3,
    Phase.COMMITTED: 4,
    Phase.ROLLING_BACK: 5,
    Phase.ABORTED: 6,
}


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 3)), max_size=25))
def test_any_order_of_messages_only_goes_forward(calls: list[tuple[str, int]]) -> None:
    state = WorkerRound()
    for name, number in calls:
        before = (state.id, RANK[state.phase])
        extra = {"verified": (APPROVAL,), "abort": ("why",)}.get(name, ())
        done = getattr(state, name)(id_of(number), *extra)
        after = (state.id, RANK[state.phase])
        assert after > before if done else after == before


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_deadline_is_a_positive_time(timeout_s: float) -> None:
    with pytest.raises(InvalidInput):
        Deadline(timeout_s)
