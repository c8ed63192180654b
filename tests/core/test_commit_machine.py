"""The order of a commit, without an engine: which steps are asked for, and what each failure leaves behind."""

from __future__ import annotations

from typing import Any

import pytest

from weightcast.commit.machine import Orders, Step
from weightcast.commit.order import RoundAnswer, RoundOrder, Serving, Standing
from weightcast.errors import DigestMismatch, EngineError, StateError

COMMIT = RoundOrder(action="commit", epoch=1, round=7, version="7-x")
BACK = RoundOrder(action="rollback", epoch=1, round=7)
OLD, NEW = Serving(version="6-x"), Serving(version="7-x")
DIRTY = Serving(version="6-x", unfit="of no version")
FREE = Standing(paused=False)


def play(orders: Orders, order: RoundOrder, results: dict[Step, Any]) -> tuple[list[Step], RoundAnswer | Exception]:
    """Carry out an order with these results; an exception is thrown, None is what steps without a result return."""
    steps, asked = orders.steps(order, {}), []
    results = {Step.ASLEEP: "", Step.STANDING: FREE, Step.APPLY: NEW, Step.SERVING: OLD, Step.TAKE_BACK: OLD, **results}
    try:
        do = next(steps)
        while True:
            asked.append(do.step)
            result = results.get(do.step)
            do = steps.throw(result) if isinstance(result, Exception) else steps.send(result)
    except StopIteration as end:
        return asked, end.value
    except Exception as error:
        return asked, error


LOOK, LEAVE = [Step.ASLEEP, Step.STANDING], [Step.RESUME]
LOST = EngineError("lost")


def failed(serving: Serving, *, partly: bool = False) -> Serving:
    return Serving(version=serving.version, unfit=serving.unfit, error=DigestMismatch("bytes"), partly=partly)


@pytest.mark.parametrize(
    ("results", "steps"),
    [
        ({}, [Step.PAUSE, Step.APPLY, Step.NAME, *LEAVE]),
        ({Step.STANDING: Standing(paused=True)}, [Step.PAUSE, Step.APPLY, Step.NAME]),
        ({Step.STANDING: Standing(paused=True, held=True)}, [Step.PAUSE, Step.APPLY, Step.NAME, *LEAVE]),
        ({Step.STANDING: Standing(paused=False, pause_forgets=False)}, [Step.PAUSE, Step.APPLY, Step.FORGET, Step.NAME, *LEAVE]),
    ],
)  # fmt: skip
def test_a_commit(results: dict[Step, Any], steps: list[Step]) -> None:
    asked, answer = play(Orders(), COMMIT, results)
    assert asked == LOOK + steps
    assert isinstance(answer, RoundAnswer)
    assert answer.version == "7-x"


@pytest.mark.parametrize("clear_cache", [True, False])
@pytest.mark.parametrize(
    ("pause", "standing", "pauses"),
    [("keep", {}, False), ("none", {}, False), ("wait", {}, True), ("keep", {"paused": True, "held": True}, True)],
)
def test_an_engine_that_changes_in_one_step_is_paused_only_where_somebody_waits(
    pause: Any, standing: dict[str, bool], pauses: bool, clear_cache: bool
) -> None:
    """It clears its cache in the step of the change, so FORGET is not asked for either."""
    order = RoundOrder(action="commit", epoch=1, round=7, version="7-x", pause=pause, clear_cache=clear_cache)
    alone = Standing(**{"paused": False, **standing}, in_one_step=True)
    asked, answer = play(Orders(), order, {Step.STANDING: alone})
    assert asked == [*LOOK, *([Step.PAUSE] if pauses else []), Step.APPLY, Step.NAME, *(LEAVE if pauses else [])]
    assert isinstance(answer, RoundAnswer)


FORGETS_LATER = {Step.STANDING: Standing(paused=False, pause_forgets=False)}
CHANGE = [Step.PAUSE, Step.APPLY]


@pytest.mark.parametrize(
    ("results", "steps", "error"),
    [
        ({Step.PAUSE: LOST}, [Step.PAUSE, *LEAVE], LOST),
        ({Step.APPLY: failed(OLD)}, [*CHANGE, Step.NAME, *LEAVE], DigestMismatch),
        ({Step.APPLY: failed(DIRTY)}, [*CHANGE, Step.HOLD], DigestMismatch),
        ({Step.APPLY: failed(DIRTY), Step.STANDING: Standing(paused=True)}, CHANGE, DigestMismatch),
        ({Step.APPLY: failed(NEW, partly=True)}, [*CHANGE, Step.TAKE_BACK, Step.NAME, *LEAVE], DigestMismatch),
        ({Step.APPLY: failed(NEW, partly=True), Step.TAKE_BACK: DIRTY}, [*CHANGE, Step.TAKE_BACK, Step.HOLD], DigestMismatch),
        ({Step.APPLY: failed(NEW, partly=True), Step.TAKE_BACK: LOST}, [*CHANGE, Step.TAKE_BACK, Step.SERVING, Step.NAME, *LEAVE], DigestMismatch),
        ({Step.APPLY: LOST}, [*CHANGE, Step.SERVING, Step.NAME, *LEAVE], LOST),
        ({Step.APPLY: LOST, Step.SERVING: DIRTY}, [*CHANGE, Step.SERVING, Step.HOLD], LOST),
        ({Step.APPLY: LOST, Step.SERVING: EngineError("gone")}, [*CHANGE, Step.SERVING], LOST),
        ({Step.FORGET: LOST, **FORGETS_LATER}, [*CHANGE, Step.FORGET, Step.TAKE_BACK, Step.NAME, *LEAVE], LOST),
        ({Step.NAME: LOST}, [*CHANGE, Step.NAME, Step.TAKE_BACK, Step.NAME], LOST),
        ({Step.RESUME: LOST}, [*CHANGE, Step.NAME, Step.RESUME], LOST),
        ({Step.STANDING: LOST}, [], LOST),
    ],
)  # fmt: skip
def test_a_failure(results: dict[Step, Any], steps: list[Step], error: Any) -> None:
    asked, raised = play(Orders(), COMMIT, results)
    assert asked == LOOK + steps
    assert raised is error if isinstance(error, Exception) else isinstance(raised, error)


def test_an_engine_that_sleeps_is_refused_before_any_worker_is_touched() -> None:
    asked, raised = play(Orders(), COMMIT, {Step.ASLEEP: "level 2"})
    assert asked == [Step.ASLEEP]
    assert isinstance(raised, StateError)
    assert "Wake it up" in str(raised)


def test_what_could_not_be_resumed_is_resumed_by_the_next_order() -> None:
    orders = Orders()
    _, raised = play(orders, COMMIT, {Step.RESUME: LOST})
    assert raised is LOST
    paused = {Step.STANDING: Standing(paused=True)}
    asked, _ = play(orders, COMMIT, paused)
    assert asked == [*LOOK, *CHANGE, Step.NAME, *LEAVE], "the same order again is not answered from memory"
    asked, _ = play(orders, RoundOrder(action="commit", epoch=1, round=8, version="7-x"), paused)
    assert asked == [*LOOK, *CHANGE, Step.NAME], "this pause is somebody else's"


def test_the_same_order_again() -> None:
    orders = Orders()
    _, answer = play(orders, COMMIT, {})
    assert play(orders, COMMIT, {Step.SERVING: NEW}) == ([Step.SERVING], answer)
    asked, _ = play(orders, COMMIT, {Step.SERVING: OLD})
    assert asked == [Step.SERVING, *LOOK, *CHANGE, Step.NAME, *LEAVE]
    asked, _ = play(orders, COMMIT, {Step.SERVING: DIRTY})
    assert Step.APPLY in asked


def test_a_roll_back_that_heals_nothing_holds_on() -> None:
    held = {
        Step.STANDING: Standing(paused=True, held=True),
        Step.APPLY: Serving(version="6-x", unfit="dirty", held=True),
    }
    asked, answer = play(Orders(), BACK, held)
    assert asked == [*LOOK, *CHANGE, Step.HOLD]
    assert isinstance(answer, RoundAnswer)


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_without_a_pause_nothing_else_than_the_weights_may_change(pause: Any) -> None:
    order = RoundOrder(action="commit", epoch=1, round=7, version="7-x", pause=pause, clear_cache=False)
    asked, _ = play(Orders(), order, {})
    assert asked == [*LOOK, *([Step.PAUSE] if pause == "keep" else []), Step.APPLY, Step.NAME, *([Step.RESUME] if pause == "keep" else [])]  # fmt: skip
    asked, _ = play(Orders(), order, {Step.STANDING: Standing(paused=False, must_pause=True)})
    assert asked == [*LOOK, *CHANGE, Step.NAME, *LEAVE]
