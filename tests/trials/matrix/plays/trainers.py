"""Faults of trainers: killed, stopped, two at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.trials.matrix.field import Field
from tests.trials.matrix.outcome import Finding, expect
from weightcast.errors import PeerLost, StateError, WeightcastError

MakeField = Callable[..., Field]
SILENCE_S = 2.0
"""Four heartbeats: a thread that was not run for one or two of them has not fallen silent."""


def killed(make: MakeField, *, point: str | None) -> Finding:
    with make() as field:
        trainer = field.start_trainer()
        if point is not None:
            field.a.arm(point, "sleep", 0.5)
            before = field.a.call("reached", point)
            trainer.start("publish", field.next_seed(2))
            field.a.wait_for(point, before)
        trainer.kill()
        if point is not None and point.startswith("commit"):
            field.consistent(field.a, field.b, cut_off=True)
        else:
            field.steady(field.a, field.b, number=1, cut_off=True)
        serving = {field.look(engine).version for engine in (field.a, field.b)}
        field.start(publish=False).connect(field.unhurried_s)
        numbers = [int(version.partition("-")[0]) for version in serving if version != "default"]
        report = field.succeed()
        expect(report.number > max(numbers), f"version {report.number} after {serving}")
        field.heal()
        return Finding("the engines go on with what they served; the next trainer joins at once")


def stopped(make: MakeField) -> Finding:
    with make(silence_s=SILENCE_S) as field:
        trainer = field.start_trainer(timeout_s=field.deadline_s)
        field.a.arm("transfer:middle", "sleep", 0.5)
        before = field.a.call("reached", "transfer:middle")
        call = trainer.start("publish", field.next_seed(2))
        field.a.wait_for("transfer:middle", before)
        trainer.stop()
        time.sleep(SILENCE_S + 1.5)
        field.steady(field.a, field.b, number=1)
        trainer.go_on()
        answer = trainer.result(call, field.deadline_s + 2)
        kinds = set(answer["errors"].values())
        # TransportError: its pair broke before it heard that the worker had left. StateError: its order to commit came first.
        allowed = {"PeerLost", "TransportError", "DeadlineExceeded", "StateError"}
        expect(kinds and kinds <= allowed, f"after it was lost: {answer}")
        for _ in range(2):
            seed = field.next_seed(int(max(field.seeds)) + 1)
            answer = trainer.call("publish", seed, field.healing_s, timeout_s=field.healing_s + 10)
            if answer["version"]:
                break
        expect(answer["version"], f"the next rounds failed: {answer}")
        number = int(answer["version"].partition("-")[0])
        field.seeds[number] = field.seed
        field.consistent(field.a, field.b)
        return Finding("the engines leave it after its silence; continued, it is told and joins again")


def second_is_refused(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        with field.second() as second:
            try:
                second.connect(field.unhurried_s)
            except WeightcastError as error:
                causes = getattr(error, "causes", {"": error}).values()
                expect(all(isinstance(cause, StateError) for cause in causes), f"{error}")
            else:
                raise AssertionError("a second trainer got in")
        del second
        field.steady(field.a, field.b, number=max(field.seeds))
        field.heal()
        return Finding("StateError; the first one goes on")


def second_takes_over(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        with field.second(takeover=True) as second:
            number = second.publish(timeout_s=field.unhurried_s).number
            expect(number == 2, f"the second trainer published {number}")
            seed = field.seed
            failure = field.fail(field.unhurried_s)
            for name in failure.causes:
                failure.names(name, StateError, PeerLost)
            field.seeds[number] = seed
            field.consistent(field.a, field.b)
        del second
        report = field.succeed()
        expect(report.number == 3, f"then the first one published {report.number}")
        field.heal()
        return Finding(f"versions go on; the first one gets {failure.outcome.text}")
