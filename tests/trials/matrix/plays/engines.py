"""Faults of engines: killed, stopped, slow, out of memory, with a loader that raises or another model, absent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.support.engine_process import SHAPES, TOKEN
from tests.support.faults import Action
from tests.trials.matrix.failure import forget_frames
from tests.trials.matrix.field import GRACE_S, UNKNOWN, Field
from tests.trials.matrix.outcome import Finding, expect
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    LoadError,
    PeerLost,
    PlanMismatch,
    ShadowError,
    TransportError,
    WeightcastError,
)
from weightcast.trainer.clients import HttpEngineClient

MakeField = Callable[..., Field]


def killed(make: MakeField, *, point: str) -> Finding:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "kill")
        failure = field.fail(field.unhurried_s)
        expect(field.a.ends(), "the fault did not strike")
        failure.names(field.a.url, PeerLost)
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.told_carefully(failure)
        field.replace()
        field.heal()
        return failure.outcome


def killed_while_joining(make: MakeField) -> Finding:
    with make() as field:
        _publish_without_a(field)
        field.a.arm("join", "kill")
        error = _fail_to_add(field, field.unhurried_s)
        expect(isinstance(error, PeerLost), f"{error}")
        field.steady(field.b, number=max(field.seeds))
        field.replace()
        _add(field)
        field.heal()
        return Finding(f"{type(error).__name__}; the fleet is as before")


def stopped_while_joining(make: MakeField) -> Finding:
    with make() as field:
        _publish_without_a(field)
        field.a.arm("join", "stop")
        start = time.monotonic()
        error = _fail_to_add(field, field.deadline_s)
        seconds = time.monotonic() - start
        expect(isinstance(error, DeadlineExceeded), f"{error}")
        expect(seconds < field.deadline_s + GRACE_S, f"it took {seconds:.1f} s")
        field.steady(field.b, number=max(field.seeds))
        assert field.publisher is not None
        expect(list(field.publisher.members) == [field.b.url], f"the fleet is {field.publisher.members}")
        field.a.go_on()
        _add(field)
        field.heal()
        return Finding("DeadlineExceeded; the fleet is as before", seconds)


def stopped(make: MakeField, *, point: str) -> Finding:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "stop")
        failure = field.fail()
        # Silence may be noticed before a longer deadline is over.
        in_time = field.deadline_s < field.options["silence_s"]
        failure.names(field.a.url, *((DeadlineExceeded,) if in_time else (DeadlineExceeded, PeerLost)))
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.told_carefully(failure)
        _goes_on(field, may_have_committed=point in ("commit:start", "commit:end", "answer"))
        field.heal()
        return failure.outcome


def struck_on_the_way_back(make: MakeField, *, point: str, action: Action) -> Finding:
    """The other engine cannot commit once the victim has, so the victim has to go back."""
    with make() as field:
        field.start()
        field.b.arm("commit:worker", "raise", 0.4)
        field.a.arm(point, action)
        failure = field.fail(field.unhurried_s if action == "kill" else field.deadline_s)
        failure.names(field.b.url, LoadError)
        error = failure.names(field.a.url, PeerLost if action == "kill" else DeadlineExceeded)
        expect(error.phase == "undo", f"not on the way back: {error}")
        expect(failure.says_of(field.a.url) == UNKNOWN, f"it cannot be asked: {failure.error}")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        if action == "kill":
            expect(field.a.ends(), "the fault did not strike")
            field.replace()
        else:
            _goes_on(field, may_have_committed=True)
        field.heal()
        return Finding(
            "past the point of return: it is unknown what that engine serves, and the next publish repairs it",
            failure.seconds,
        )


def one_of_two_workers_cannot_commit(make: MakeField) -> Finding:
    with make(num_workers=2) as field:
        field.start()
        field.a.arm("commit:worker", "raise", skip=1)
        failure = field.fail(field.unhurried_s)
        # A pair that breaks off in the commit may be noticed before the worker's answer is there.
        cause = failure.names(field.a.url, LoadError, *([] if field.mode == "staged" else [TransportError]))
        expect(cause.worker == 1, f"does not name the worker: {cause}")
        if field.mode == "staged":
            field.steady_after(failure)
            return Finding("LoadError names the worker; the engine is at n with all workers", failure.seconds)
        expect(field.look(field.a).dirty, f"serves two versions as one: {field.look(field.a)}")
        field.told_truly(failure, field.a, field.b)
        field.heal()
        return Finding("LoadError names the worker; the engine is dirty until the next publish", failure.seconds)


def transfer_raises(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "raise")
        failure = field.fail(field.unhurried_s)
        failure.names(field.a.url, TransportError, LoadError)
        field.steady_after(failure)
        return failure.outcome


def loader_raises(make: MakeField) -> Finding:
    with make(loader=True) as field:
        field.start()
        field.a.arm("loader", "raise")
        failure = field.fail(field.unhurried_s)
        failure.names(field.a.url, LoadError)
        field.steady_after(failure)
        return failure.outcome


def no_memory_for_the_shadow(make: MakeField) -> Finding:
    with make() as field:
        field.a.arm("shadow", "no memory")
        try:
            field.start(publish=False).connect(field.unhurried_s)
        except ShadowError as error:
            expect(error.engine == field.a.url, f"{error} names another engine")
        else:
            raise AssertionError("connected without a shadow")
        field.steady(field.a, field.b, number=0)
        field.heal()
        return Finding("ShadowError names the engine; nothing changed")


def never_joins(make: MakeField) -> Finding:
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
        expect(seconds < field.deadline_s + GRACE_S, f"it took {seconds:.1f} s")
        field.steady(field.a, field.b, number=0)
        assert field.publisher is not None
        field.publisher.remove(field.a.url)
        field.publisher.add(field.a.url)
        field.heal()
        return Finding("DeadlineExceeded names the engine; nothing changed", seconds)


def slow(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "sleep", field.deadline_s + 0.7)
        failure = field.fail()
        failure.names(field.a.url, DeadlineExceeded)
        field.steady(field.a, field.b)
        field.heal()
        return failure.outcome


def manifests_disagree(make: MakeField) -> Finding:
    with make() as field:
        name = next(iter(SHAPES))
        missing = field.tensors.pop(name)
        try:
            field.start(publish=False).connect(field.unhurried_s)
        except WeightcastError as error:
            causes = getattr(error, "causes", {"": error}).values()
            expect(all(isinstance(cause, PlanMismatch) for cause in causes), f"{error}")
            expect(all(name in cause.message for cause in causes), f"{name} is not named: {error}")
        else:
            raise AssertionError("connected with another model")
        field.steady(field.a, field.b, number=0)
        field.stop()
        field.tensors[name] = missing
        field.tensors = {name: field.tensors[name] for name in SHAPES}
        field.start()
        field.heal()
        return Finding("PlanMismatch names the tensor; nothing changed")


def _set_up_again(field: Field) -> None:
    """Leave the pair of the victim in need of a new set-up."""
    field.a.arm("transfer:start", "raise")
    field.fail(field.unhurried_s)
    field.seeds.pop(max(field.seeds), None)


def _goes_on(field: Field, *, may_have_committed: bool) -> None:
    """The stopped victim goes on. What it then does on its own leaves it at n, or, where the order to commit had come, at n or
    n+1: its answer had been given up, and whoever waited for it could not ask again."""
    field.a.go_on()
    field.consistent(field.a)
    if not may_have_committed:
        field.steady(field.a)


def _publish_without_a(field: Field) -> None:
    """A trainer that has published to the bystander alone."""
    field.start([field.b.url], publish=False)
    field.succeed(engines=[field.b])


def _add(field: Field, timeout_s: float | None = None) -> None:
    assert field.publisher is not None
    field.publisher.add(field.a.url, timeout_s)


def _fail_to_add(field: Field, timeout_s: float) -> WeightcastError:
    """The error that adding the victim ends with."""
    try:
        _add(field, timeout_s)
    except WeightcastError as error:
        forget_frames(error)
        return error
    raise AssertionError("it was added")
