"""Joining in questions and pauses: few questions, pauses that grow, and an end at the first error."""

from __future__ import annotations

import pytest

from weightcast.commit.joining import FIRST_PAUSE_S, LAST_PAUSE_S, Question, greeting, joining
from weightcast.commit.worker_outcome import WorkerOutcome
from weightcast.errors import ErrorForm, StateError

INFO = {"address": "tcp://127.0.0.1:1"}


def workers(*are_greeting: bool) -> list[WorkerOutcome]:
    return [
        WorkerOutcome(rank=rank, weight_version="default", digest="", dirty=False, is_greeting=is_greeting)
        for rank, is_greeting in enumerate(are_greeting)
    ]


def failed() -> list[WorkerOutcome]:
    error = ErrorForm.of(StateError("another trainer publishes to this engine"))
    return [WorkerOutcome(rank=0, weight_version="default", digest="", dirty=False, error=error)]


def test_workers_join_once_the_trainers_answer_is_there_for_all_of_them() -> None:
    steps = joining(INFO, 2)
    payload = {"init_info": INFO, "world_size": 2}
    assert steps.send(None) == Question("greet", payload)
    pauses = []
    for is_last in (False, False, False, False, False, True):
        pauses.append(steps.send(workers(True, is_last)))
        assert steps.send(None) == Question("status", {})
    assert pauses[0] == FIRST_PAUSE_S
    assert pauses[-1] == LAST_PAUSE_S
    assert pauses == sorted(pauses)
    assert steps.send(workers(False, False)) == Question("init", payload)
    with pytest.raises(StopIteration):
        steps.send(workers(False, False))


def test_greeting_alone_ends_before_the_join() -> None:
    steps = greeting(INFO, 1)
    steps.send(None)
    with pytest.raises(StopIteration):
        steps.send(workers(False))


@pytest.mark.parametrize("after", ["greet", "status", "init"])
def test_the_first_error_of_a_worker_ends_it(after: str) -> None:
    steps = joining(INFO, 1)
    step = steps.send(None)
    while step != Question(after, step.payload if isinstance(step, Question) else {}):
        step = steps.send(None if isinstance(step, float) else workers(after == "status"))
    with pytest.raises(StateError, match="another trainer"):
        steps.send(failed())
