"""Faults under require="live": the engine that fails is left out, the others go on, it comes back by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from tests.support.faults import Action
from tests.trials.matrix.field import GRACE_S, Field
from tests.trials.matrix.outcome import Finding, expect

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
        field.a.arm(point, action)
        timeout_s = field.unhurried_s
        report = field.succeed(timeout_s, engines=[field.b])
        seconds = field.seconds
        expect(seconds < timeout_s + GRACE_S, f"it took {seconds:.1f} s")
        mine = next(engine for engine in report.engines if engine.name == field.a.url)
        expect(not mine.ok and not report.ok, f"the report says ok: {report}")
        expect(re.search(TELLS[action], mine.error or ""), f"the report says {mine.error!r} after {action}")
        if action == "kill":
            field.succeed(timeout_s, engines=[field.b])
            field.replace()
        elif action == "stop":
            field.succeed(timeout_s, engines=[field.b])
            field.a.go_on()
        field.consistent(field.a)
        _comes_back(field)
        field.heal()
        return Finding("the others publish; it comes back by itself", seconds)


def _comes_back(field: Field) -> None:
    assert field.publisher is not None
    end = time.monotonic() + field.healing_s
    while True:
        report = field.succeed(engines=[field.b])
        if report.ok:
            return
        expect(time.monotonic() < end, f"it did not come back: {report.engines}")
