"""Faults of engines: killed, stopped, slow, out of memory, with a loader that raises or another model, absent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PlanMismatch, ShadowError, WeightcastError
from weightcast.testing.engine_process import SHAPES, TOKEN
from weightcast.testing.matrix.field import Field, forget_frames
from weightcast.testing.matrix.outcome import Outcome, expect
from weightcast.trainer.clients import HttpEngineClient

MakeField = Callable[..., Field]


def killed(make: MakeField, *, point: str) -> Outcome:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "kill")
        failure = field.fail()
        expect(field.a.ends(), "the fault did not strike")
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.replace()
        field.heal()
        return failure.outcome


def killed_while_joining(make: MakeField) -> Outcome:
    with make() as field:
        field.start([field.b.url], publish=False)
        field.succeed(engines=[field.b])
        assert field.publisher is not None
        field.a.arm("join", "kill")
        error = _add(field, field.a.url)
        field.steady(field.b, number=max(field.seeds))
        field.replace()
        field.publisher.add(field.a.url)
        field.heal()
        return Outcome(f"{type(error).__name__}; the fleet is as before")


def stopped(make: MakeField, *, point: str) -> Outcome:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "stop")
        failure = field.fail()
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.a.go_on()
        time.sleep(0.5)
        field.consistent(field.a)
        if not point.startswith("commit"):
            field.steady(field.a)
        field.heal()
        return failure.outcome


def transfer_raises(make: MakeField) -> Outcome:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "raise")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) in ("TransportError", "LoadError"), f"{failure.error}")
        field.steady_after(failure)
        return failure.outcome


def loader_raises(make: MakeField) -> Outcome:
    with make(loader=True) as field:
        field.start()
        field.a.arm("loader", "raise")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "LoadError", f"{failure.error}")
        field.steady_after(failure)
        return failure.outcome


def no_memory_for_the_shadow(make: MakeField) -> Outcome:
    with make() as field:
        field.a.arm("shadow", "no memory")
        try:
            field.start(publish=False).connect(field.deadline_s)
        except ShadowError as error:
            expect(error.engine == field.a.url, f"{error} names another engine")
        else:
            raise AssertionError("connected without a shadow")
        field.steady(field.a, field.b, number=0)
        field.heal()
        return Outcome("ShadowError names the engine; nothing changed")


def never_joins(make: MakeField) -> Outcome:
    class Mute(HttpEngineClient):
        """Its workers never say hello."""

        def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
            return

    with make() as field:
        mute = Mute(field.a.url, token=TOKEN)
        start = time.monotonic()
        try:
            field.start([mute, field.b.url], publish=False).connect(field.deadline_s)
        except DeadlineExceeded as error:
            expect(error.engine == field.a.url and error.phase == "join", f"{error} does not say who and when")
        else:
            raise AssertionError("connected without workers")
        seconds = time.monotonic() - start
        expect(seconds < field.deadline_s + 2, f"it took {seconds:.1f} s")
        field.steady(field.a, field.b, number=0)
        assert field.publisher is not None
        field.publisher.remove(field.a.url)
        field.publisher.add(field.a.url)
        field.heal()
        return Outcome("DeadlineExceeded names the engine; nothing changed", seconds)


def slow(make: MakeField) -> Outcome:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "sleep", field.deadline_s + 0.7)
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DeadlineExceeded", f"{failure.error}")
        field.steady(field.b)
        time.sleep(1.0)
        field.steady(field.a)
        field.heal()
        return failure.outcome


def manifests_disagree(make: MakeField) -> Outcome:
    with make() as field:
        missing = field.tensors.pop(next(iter(SHAPES)))
        try:
            field.start(publish=False).connect(field.deadline_s)
        except WeightcastError as error:
            causes = getattr(error, "causes", {"": error}).values()
            expect(all(isinstance(cause, PlanMismatch) for cause in causes), f"{error}")
        else:
            raise AssertionError("connected with another model")
        field.steady(field.a, field.b, number=0)
        field.stop()
        field.tensors[next(iter(SHAPES))] = missing
        field.tensors = {name: field.tensors[name] for name in SHAPES}
        field.start()
        field.heal()
        return Outcome("PlanMismatch names the tensor; nothing changed")


def _set_up_again(field: Field) -> None:
    """Leave the pair of the victim in need of a new set-up."""
    field.a.arm("transfer:start", "raise")
    field.fail()
    field.seeds.pop(max(field.seeds), None)


def _add(field: Field, url: str) -> WeightcastError:
    assert field.publisher is not None
    try:
        field.publisher.add(url, field.deadline_s)
    except WeightcastError as error:
        forget_frames(error)
        return error
    raise AssertionError("it was added")
