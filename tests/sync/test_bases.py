"""A round's base: what an engine serves when a round begins. A trainer that is mistaken in it changes nothing, and learns better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from weightcast import Publisher
from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.errors import BaseMismatch, RoundFailed, StateError
from weightcast.messages import Begin, Message
from weightcast.report.model import Report
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.fleet.link import UNKNOWN

Weights = dict[str, torch.Tensor]
TIMEOUT_S = 30.0


def values() -> Weights:
    return {"a": torch.randn(9, 7), "b": torch.randn(31), "loaded": torch.randn(5)}


@pytest.fixture
def make() -> Iterator[Callable[..., LocalEngine]]:
    made: list[LocalEngine] = []

    def engine(name: str, mode: str = "auto", workers: int = 1) -> LocalEngine:
        models = [
            DictModel(values(), relocatable=len(made) % 2 == 0, through_loader=("loaded",)) for _ in range(workers)
        ]
        made.append(LocalEngine(name, models, mode=mode))
        return made[-1]

    yield engine
    for engine_ in made:
        engine_.stop()


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Each engine's name and base, as they are sent."""
    sent: list[tuple[str, str | None]] = []
    send = Coordinator.send

    def noted(self: Coordinator, member: Member, message: Message) -> None:
        if isinstance(message, Begin):
            sent.append((member.engine, message.base))
        send(self, member, message)

    monkeypatch.setattr(Coordinator, "send", noted)
    return sent


def holds(engine: LocalEngine, weights: Mapping[str, torch.Tensor]) -> bool:
    return all(model.holds(weights) for model in engine.models)


def took_back(engine: LocalEngine, report: Report) -> None:
    """Somebody else than the trainer takes a committed round back."""
    engine.rollback(report.epoch, report.round, Deadline(TIMEOUT_S))


@pytest.mark.parametrize("require", ["all", "live"])
def test_an_engine_that_was_taken_back_refuses_and_then_takes_the_next_round(
    require: str, make: Callable[..., LocalEngine], bases: list[tuple[str, str | None]]
) -> None:
    given, a, b = values(), make("a", "staged", workers=2), make("b", "staged")
    with Publisher(given, [a, b], require=require, timeout_s=TIMEOUT_S) as publisher:  # type: ignore[arg-type]
        first = publisher.publish()
        one = {name: value.clone() for name, value in given.items()}
        given.update(values())
        second = publisher.publish()
        two = {name: value.clone() for name, value in given.items()}
        took_back(a, second)
        assert holds(a, one)
        given.update(values())
        if require == "all":
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
            errors = caught.value.causes
            assert caught.value.serving == {"a": "unknown", "b": second.version}
            assert holds(b, two)
        else:
            report = publisher.publish()
            assert not report.ok
            errors = {engine.name: engine.error for engine in report.engines if engine.error is not None}
            assert holds(b, given)
        assert set(errors) == {"a"}
        assert isinstance(errors["a"], BaseMismatch) or require == "live"  # a report has texts
        assert first.digest in str(errors["a"])
        assert second.digest in str(errors["a"])
        # Unharmed: it serves what it served, and the next round is one like any other.
        assert holds(a, one)
        assert {worker.weight_version for worker in a.workers} == {first.version}
        assert not any(worker.dirty for worker in a.workers)
        given.update(values())
        last_of_b = b.workers[0].digest
        bases.clear()
        report = publisher.publish()
        assert report.ok
        assert set(bases) == {("a", first.digest), ("b", last_of_b)}
        assert holds(a, given)
        assert holds(b, given)


def test_in_place_the_engine_is_untouched_too(make: Callable[..., LocalEngine]) -> None:
    """Nothing of a published version can be taken back there; the trainer is mistaken for another reason."""
    given, engine = values(), make("a", "in_place")
    with Publisher(given, [engine], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
        one = {name: value.clone() for name, value in given.items()}
        (link,) = publisher._part.engines  # type: ignore[union-attr]
        link.digest = "0" * 16
        given.update(values())
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert isinstance(caught.value.causes["a"], StateError)
        assert "the round builds on 0000000000000000" in str(caught.value)
        assert caught.value.dirty == ()
        assert holds(engine, one)
        assert publisher.publish().ok
        assert holds(engine, given)


def test_each_engine_is_sent_its_own_base(
    make: Callable[..., LocalEngine], bases: list[tuple[str, str | None]]
) -> None:
    """One lags behind, one is new."""
    given, a, b = values(), make("a"), make("b")
    with Publisher(given, [a, b], require="live", timeout_s=TIMEOUT_S) as publisher:
        first = publisher.publish()
        assert set(bases) == {("a", ""), ("b", "")}
        b.refuse("commit")
        given.update(values())
        second = publisher.publish()
        assert not second.ok
        b.refuse()
        c = make("c")
        given.update(values())
        publisher.add(c)
        bases.clear()
        report = publisher.publish()
        assert report.ok
        assert set(bases) == {("a", second.digest), ("b", first.digest), ("c", "")}
        assert all(holds(engine, given) for engine in (a, b, c))


def test_what_another_trainer_left_is_the_base_of_the_next(
    make: Callable[..., LocalEngine], bases: list[tuple[str, str | None]]
) -> None:
    engine, ours, theirs = make("a"), values(), values()
    with Publisher(ours, [engine], timeout_s=TIMEOUT_S) as publisher:
        first = publisher.publish()
        with Publisher(theirs, [engine], takeover=True, timeout_s=TIMEOUT_S) as other:
            second = other.publish()
            assert holds(engine, theirs)
        ours.update(values())
        assert publisher.publish().ok
        assert holds(engine, ours)
        assert bases == [("a", ""), ("a", first.digest), ("a", second.digest)]


def test_a_dirty_engine_takes_a_round_that_builds_on_nothing(
    make: Callable[..., LocalEngine], bases: list[tuple[str, str | None]]
) -> None:
    given, engine = values(), make("a", "in_place", workers=2)
    with Publisher(given, [engine], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
        given.update(values())
        engine.models[1].fail_load = RuntimeError("not now")
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert caught.value.dirty == ("a",)
        bases.clear()
        given.update(values())
        assert publisher.publish().ok
        assert {base for _, base in bases} == {None}
        assert holds(engine, given)


def test_an_engine_whose_order_is_late_is_asked_once_more(make: Callable[..., LocalEngine]) -> None:
    """What a lost round ordered is carried out after the engine has said what it serves, and before the next round begins."""
    given, a, b = values(), make("a", "staged"), make("b", "staged")
    with Publisher(given, [a, b], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
        given.update(values())
        second = publisher.publish()
        link = next(link for link in publisher._part.engines if link.name == "a")  # type: ignore[union-attr]
        link.version = UNKNOWN
        status = a.status

        def late(deadline: Deadline) -> Mapping[str, object]:
            answer = status(deadline)
            a.status = status  # type: ignore[method-assign]
            took_back(a, second)
            return answer

        a.status = late  # type: ignore[method-assign, assignment]
        given.update(values())
        report = publisher.publish()
        assert report.ok
        assert holds(a, given)
        assert holds(b, given)
