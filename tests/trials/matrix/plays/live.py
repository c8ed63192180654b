"""Faults under require="live": the engine that fails is left out, the others go on, it comes back by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from tests.support.engine_process import EngineProcess
from tests.support.faults import Action
from tests.trials.matrix.field import GRACE_S, Field
from tests.trials.matrix.outcome import Finding, expect
from weightcast.report.model import Report

MakeField = Callable[..., Field]


TELLS: dict[Action, str] = {
    "kill": "is gone|refused|disconnected|reset",
    "stop": "no answer in|took longer than",
    "corrupt": "digest",
}
"""What a report, which has no classes, says of the engine that an action struck."""


def without(make: MakeField, *, point: str, action: Action) -> Finding:
    with make(require="live") as field:
        field.start()
        report = struck(field, point, action, lost=field.a, spared=field.b)
        seconds = field.seconds
        comes_back(field)
        expect(not report.ok, f"the report says ok: {report}")
        return Finding("the others publish; it comes back by itself", seconds)


def struck(field: Field, point: str, action: Action, *, lost: EngineProcess, spared: EngineProcess) -> Report:
    """The round in which something happens to the victim, and which one engine is lost to and the other one is not."""
    field.a.arm(point, action)
    timeout_s = field.unhurried_s
    report = field.succeed(timeout_s, engines=[spared])
    expect(field.seconds < timeout_s + GRACE_S, f"it took {field.seconds:.1f} s")
    outcomes = {engine.name: engine for engine in report.engines}
    mine = outcomes[lost.url]
    expect(outcomes[spared.url].ok and not mine.ok, f"the wrong engine is ok: {report}")
    expect(re.search(TELLS[action], mine.error or ""), f"the report says {mine.error!r} after {action}")
    seconds = field.seconds
    if action == "kill":
        field.succeed(timeout_s, engines=[spared])
        field.replace()
    elif action == "stop":
        field.succeed(timeout_s, engines=[spared])
        field.a.go_on()
    field.seconds = seconds
    field.consistent(field.a)
    return report


def comes_back(field: Field) -> None:
    """All engines are in a round again, by themselves, and stay."""
    assert field.publisher is not None
    end = time.monotonic() + field.healing_s
    while not (report := field.succeed(engines=[field.b])).ok:
        expect(time.monotonic() < end, f"it did not come back: {report.engines}")
    field.heal()
