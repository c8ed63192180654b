"""Faults under require="live": the engine that fails is left out, the others go on, it comes back by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from weightcast.testing.faults import Action
from weightcast.testing.matrix.field import Field
from weightcast.testing.matrix.outcome import Outcome, expect

MakeField = Callable[..., Field]


def without(make: MakeField, *, point: str, action: Action) -> Outcome:
    with make(require="live") as field:
        field.start()
        field.a.arm(point, action)
        start = time.monotonic()
        report = field.succeed(field.deadline_s, engines=[field.b])
        seconds = time.monotonic() - start
        expect(seconds < field.deadline_s + 2, f"it took {seconds:.1f} s")
        mine = next(engine for engine in report.engines if engine.name == field.a.url)
        expect(not mine.ok and mine.error, "the report does not name the engine")
        expect(not report.ok, "the report says ok")
        if action == "kill":
            field.succeed(field.deadline_s, engines=[field.b])
            field.replace()
        elif action == "stop":
            field.succeed(field.deadline_s, engines=[field.b])
            field.a.go_on()
            time.sleep(0.3)
        field.consistent(field.a)
        _comes_back(field)
        field.heal()
        return Outcome("the others publish; it comes back by itself", seconds)


def _comes_back(field: Field) -> None:
    assert field.publisher is not None
    end = time.monotonic() + field.healing_s
    while True:
        report = field.succeed(engines=[field.b])
        if report.ok:
            return
        expect(time.monotonic() < end, f"it did not come back: {report.engines}")
