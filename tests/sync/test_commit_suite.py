"""One commit, whichever way an engine is reached: pauses, caches, and what a failure of each step leaves behind."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from tests.support.commit_ways import RAY, WAYS, Loop, Way

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, LoadError, WeightcastError
from weightcast.trainer.clients import CommitOrder

SOON = 10.0
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    monkeypatch.setitem(sys.modules, "ray", RAY)
    make: Callable[[Loop], AbstractContextManager[Way]] = request.param
    with make(loop) as made:
        yield made


@pytest.fixture
def pausing(way: Way) -> Way:
    if not way.pauses:
        pytest.skip("an offline engine has no steps that could be paused")
    return way


def order(**fields: Any) -> CommitOrder:
    number = next(_numbers)
    return CommitOrder(epoch=1, round=number, version=f"{number}-x", **fields)


def commit(way: Way, timeout_s: float = SOON, **fields: Any) -> CommitOrder:
    given = order(**fields)
    way.client.commit(given, Deadline(timeout_s))
    return given


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 15
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("clear_cache", [True, False])
@pytest.mark.parametrize("pause", ["keep", "wait", "abort", "none"])
def test_a_commit(way: Way, pause: str, clear_cache: bool) -> None:
    given = commit(way, pause=pause, clear_cache=clear_cache)
    assert way.version == given.version
    assert way.client.status(Deadline(SOON))["weight_version"] == given.version
    assert way.computes
    shown = [] if pause == "none" and not clear_cache else ["keep" if pause == "none" else pause]
    assert way.modes() == (shown if way.pauses else [])
    assert way.forgot() is clear_cache


def test_the_phases_of_a_commit_are_told(way: Way) -> None:
    reply = way.client.commit(order(), Deadline(SOON))
    assert set(reply.phases) == {"pause", "apply", "resume"}


def test_a_pause_that_there_is_not_is_refused(way: Way) -> None:
    with pytest.raises(InvalidInput, match="pause"):
        commit(way, pause="often")
    assert (way.num_updates, way.computes) == (0, True)


@pytest.mark.parametrize("fails", [None, "apply"])
@pytest.mark.parametrize("pause", ["keep", "none"])
def test_a_pause_of_the_owner_stays(pausing: Way, pause: str, fails: Any) -> None:
    pausing.pause()
    if fails:
        pausing.fail(fails)
        with pytest.raises(LoadError):
            commit(pausing, pause=pause)
        assert pausing.paused
    commit(pausing, pause=pause)
    assert pausing.paused
    assert pausing.forgot(), "requests that the owner froze go on with keys of the new weights"


@pytest.mark.parametrize("pause", ["keep", "wait", "abort", "none"])
def test_an_update_that_fails_leaves_the_version_before(way: Way, pause: str) -> None:
    before = commit(way)
    way.fail("apply")
    with pytest.raises(LoadError) as caught:
        commit(way, pause=pause)
    assert caught.value.engine == way.client.name
    assert (way.version, way.computes) == (before.version, True)
    after = commit(way, pause=pause)
    assert (way.version, way.computes) == (after.version, True)


@pytest.mark.parametrize("pause", ["keep", "none"])
@pytest.mark.parametrize("heal_pause", ["keep", "none"])
def test_an_engine_of_no_version_computes_nothing_until_an_update_succeeds(
    way: Way, pause: str, heal_pause: str
) -> None:
    commit(way)
    way.fail("dirty")
    failed = order(pause=pause)
    with pytest.raises(LoadError):
        way.client.commit(failed, Deadline(SOON))
    assert way.client.status(Deadline(SOON))["dirty"]
    assert not way.computes
    way.client.rollback(failed.epoch, failed.round, Deadline(SOON))
    assert not way.computes, "a roll-back that has nothing to take back heals nothing"
    healed = commit(way, pause=heal_pause)
    assert (way.version, way.computes) == (healed.version, True)
    assert not way.client.status(Deadline(SOON))["dirty"]


def test_a_pause_of_the_owner_outlives_a_failure_that_is_healed(pausing: Way) -> None:
    pausing.pause()
    pausing.fail("dirty")
    with pytest.raises(LoadError):
        commit(pausing)
    assert pausing.paused
    commit(pausing)
    assert pausing.paused


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_pause_that_takes_too_long_changes_nothing(pausing: Way, mode: str) -> None:
    before = commit(pausing)
    updates = pausing.num_updates
    pausing.take_time("pause", 0.5)
    with pytest.raises(DeadlineExceeded):
        commit(pausing, 0.2, pause=mode)
    assert eventually(lambda: pausing.computes)
    assert (pausing.version, pausing.num_updates) == (before.version, updates)
    pausing.take_time("pause", 0)
    after = commit(pausing, pause=mode)
    assert (pausing.version, pausing.computes) == (after.version, True)


def test_an_order_that_outlasts_its_deadline_runs_to_its_end(way: Way) -> None:
    before = commit(way)
    updates = way.num_updates
    way.take_time("apply", 0.5)
    late = order()
    with pytest.raises(DeadlineExceeded):
        way.client.commit(late, Deadline(0.2))
    way.take_time("apply", 0)
    way.client.commit(late, Deadline(SOON))
    assert eventually(lambda: way.computes)
    assert way.version == late.version
    assert way.num_updates <= updates + 2, "its answer was lost, and asking for it again is harmless"
    way.client.rollback(late.epoch, late.round, Deadline(SOON))
    assert (way.version, way.computes) == (before.version, True)


def test_resuming_that_takes_long_is_still_done(pausing: Way) -> None:
    commit(pausing)
    pausing.take_time("resume", 0.5)
    with pytest.raises(DeadlineExceeded):
        commit(pausing, 0.2)
    assert eventually(lambda: pausing.computes)
    pausing.take_time("resume", 0)
    commit(pausing)
    assert pausing.computes


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_caches_that_cannot_be_forgotten_leave_the_version_before(way: Way, pause: str) -> None:
    before = commit(way)
    way.fail("forget")
    with pytest.raises(WeightcastError):
        commit(way, pause=pause)
    assert (way.version, way.computes) == (before.version, True)


def test_the_same_order_again_changes_nothing(way: Way) -> None:
    given = commit(way)
    updates = way.num_updates
    way.client.commit(given, Deadline(SOON))
    assert (way.version, way.num_updates, way.computes) == (given.version, updates, True)


def test_a_roll_back(way: Way) -> None:
    before = commit(way)
    given = commit(way)
    for _ in range(2):
        way.client.rollback(given.epoch, given.round, Deadline(SOON))
        assert (way.version, way.computes) == (before.version, True)
    way.client.rollback(1, next(_numbers), Deadline(SOON))
    assert (way.version, way.computes) == (before.version, True)
