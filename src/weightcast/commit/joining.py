"""How workers that never raise join a trainer: they greet it, and join once it has answered, so that no step of theirs waits for it.

``joining`` says what to ask of the workers and when, without I/O; ``join`` and ``join_async`` carry it out. Between two questions the
workers have nothing to do with it: a call to vLLM's workers keeps them spinning for a while, which on few cores takes the turns of
the trainer that they wait for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from weightcast.commit.worker_outcome import WorkerOutcome, first_error
from weightcast.deadline import Deadline

FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 0.5
"""A trainer answers within milliseconds as a rule; where that takes longer it is no use to ask often."""


@dataclass(frozen=True, slots=True)
class Question:
    """A call of all workers."""

    action: str
    payload: Mapping[str, Any]


def greeting(
    init_info: Mapping[str, Any], world_size: int
) -> Generator[Question | float, list[WorkerOutcome] | None, None]:
    """Questions, answered by the workers' outcomes, and pauses in seconds, until every worker's trainer has answered or will not.

    Raises the first error of a worker that could not even greet.
    """
    outcomes = yield Question("greet", _payload(init_info, world_size))
    pause_s = FIRST_PAUSE_S
    while _are_greeting(outcomes):
        yield pause_s
        pause_s = min(2 * pause_s, LAST_PAUSE_S)
        outcomes = yield Question("status", {})


def joining(
    init_info: Mapping[str, Any], world_size: int
) -> Generator[Question | float, list[WorkerOutcome] | None, None]:
    """``greeting``, and then the join itself. Raises the first error of any worker."""
    yield from greeting(init_info, world_size)
    outcomes = yield Question("init", _payload(init_info, world_size))
    _are_greeting(outcomes)


def join(
    steps: Generator[Question | float, list[WorkerOutcome] | None, None],
    ask: Callable[[str, Mapping[str, Any]], list[WorkerOutcome]],
    deadline: Deadline,
) -> None:
    """Carry out ``greeting`` or ``joining`` on this thread."""
    outcomes = None
    try:
        while True:
            step = steps.send(outcomes)
            if isinstance(step, Question):
                outcomes = ask(step.action, step.payload)
            else:
                deadline.check("greeting the trainer")
                time.sleep(step)
    except StopIteration:
        return


async def join_async(
    steps: Generator[Question | float, list[WorkerOutcome] | None, None],
    ask: Callable[[str, Mapping[str, Any]], Awaitable[list[WorkerOutcome]]],
) -> None:
    """Carry out ``greeting`` or ``joining`` on an event loop."""
    outcomes = None
    try:
        while True:
            step = steps.send(outcomes)
            if isinstance(step, Question):
                outcomes = await ask(step.action, step.payload)
            else:
                await asyncio.sleep(step)
    except StopIteration:
        return


def _payload(init_info: Mapping[str, Any], world_size: int) -> Mapping[str, Any]:
    return {"init_info": dict(init_info), "world_size": world_size}


def _are_greeting(outcomes: list[WorkerOutcome] | None) -> bool:
    """Whether a worker still waits for its trainer. Raises the first error of any: then it is no use to wait for the others."""
    assert outcomes is not None
    error = first_error(outcomes)
    if error is not None:
        raise error
    return any(outcome.is_greeting for outcome in outcomes)
