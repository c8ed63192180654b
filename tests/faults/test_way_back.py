"""The way back of engines whose round failed: roll-backs that take long or break off, and workers that part ways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, LoadError, RoundFailed, StateError
from weightcast.receiver.exchange import Exchange
from weightcast.testing.local_engine import DictModel, LocalEngine

SHAPES = {"embed": (16, 8), "up": (24, 8), "norm": (6,)}
Tensors = dict[str, torch.Tensor]
Make = Callable[..., LocalEngine]


def values() -> Tensors:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def step(weights: Tensors) -> Tensors:
    """New values for the publisher's tensors; returns a copy."""
    weights.update(values())
    return {name: value.clone() for name, value in weights.items()}


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[LocalEngine] = []

    def engine(name: str, *, size: int = 1, mode: str = "staged", **options: Any) -> LocalEngine:
        models = [DictModel(values(), rows=(rank, size), **options) for rank in range(size)]
        made.append(LocalEngine(name, models, mode=mode))
        return made[-1]

    yield engine
    for engine_made in made:
        engine_made.stop()


def test_a_round_waits_for_a_roll_back_that_outlasts_its_order(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, other, weights = make("slow", relocatable=False), make("other"), values()
    go_on, in_roll_back = threading.Event(), threading.Event()
    exchange, roll_back = Exchange.run, slow.rollback
    threads: list[threading.Thread] = []

    def slowly(self: Exchange) -> None:
        if in_roll_back.is_set():
            assert go_on.wait(20)
        exchange(self)

    def outlasts(epoch: int, round: int, deadline: Deadline) -> None:
        in_roll_back.set()
        threads.append(threading.Thread(target=roll_back, args=(epoch, round, deadline)))
        threads[-1].start()
        raise DeadlineExceeded("the roll-back still runs")

    monkeypatch.setattr(Exchange, "run", slowly)
    with Publisher(weights, [slow, other], timeout_s=10) as publisher:
        before = step(weights)
        first = publisher.publish()
        monkeypatch.setattr(slow, "rollback", outlasts)
        other.refuse("commit")
        step(weights)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert caught.value.serving["slow"] == "unknown"
        other.refuse()
        step(weights)
        with pytest.raises(RoundFailed, match="rolling back") as caught:
            publisher.publish()
        assert isinstance(caught.value.causes["slow"], StateError)
        go_on.set()
        for thread in threads:
            thread.join(20)
        assert slow.models[0].holds(before)
        assert (slow.workers[0].weight_version, slow.workers[0].dirty) == (first.version, False)
        monkeypatch.setattr(slow, "rollback", roll_back)
        wanted = step(weights)
        assert publisher.publish().ok
        assert slow.models[0].holds(wanted)


def test_a_roll_back_that_breaks_off_leaves_the_engine_dirty_until_the_next_round(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, other, weights = make("broken", relocatable=False), make("other"), values()
    exchange = Exchange.run
    with Publisher(weights, [broken, other], timeout_s=10) as publisher:
        publisher.publish()
        other.refuse("commit")
        commits = iter([True, False])

        def breaks_off(self: Exchange) -> None:
            if not next(commits):
                raise LoadError("the exchange broke off")
            exchange(self)

        monkeypatch.setattr(Exchange, "run", breaks_off)
        step(weights)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert caught.value.dirty == ("broken",)
        assert broken.workers[0].dirty
        monkeypatch.setattr(Exchange, "run", exchange)
        other.refuse()
        wanted = step(weights)
        assert publisher.publish().ok
        assert broken.models[0].holds(wanted)
        assert not broken.workers[0].dirty


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_workers_that_serve_two_versions_make_their_engine_dirty(
    make: Make, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, weights = make("two", size=2, mode=mode), values()
    with Publisher(weights, [two], timeout_s=10) as publisher:
        before = step(weights)
        first = publisher.publish()
        receiver = two.workers[1].receiver

        def stumbles(*_: object) -> None:
            raise LoadError("worker 1 stumbles")

        with monkeypatch.context() as patch:
            patch.setattr(receiver, "commit", stumbles)
            step(weights)
            with pytest.raises(RoundFailed, match="worker 1 stumbles") as caught:
                publisher.publish()
        if mode == "staged":
            assert caught.value.serving == {"two": first.version}
            assert caught.value.dirty == ()
            assert all(model.holds(before) for model in two.models)
        else:
            assert caught.value.serving == {}
            assert caught.value.dirty == ("two",)
            assert publisher.members == {"two": "dirty"}
        wanted = step(weights)
        assert publisher.publish().ok
        assert all(model.holds(wanted) for model in two.models)
        assert publisher.members == {"two": "ready"}


@pytest.mark.parametrize("found", ["dirty", "another version", "another digest"])
def test_a_trainer_hears_every_worker_of_an_engine_that_joins(make: Make, found: str) -> None:
    two, weights = make("two", size=2), values()
    with Publisher(weights, [two], timeout_s=10) as publisher:
        publisher.publish()
    receiver = two.workers[1].receiver
    if found == "dirty":
        receiver.dirty = True
    elif found == "another version":
        receiver.version, two.workers[1]._label = "7-0123456789ab", None
    else:
        receiver.content = "0" * 16
    # Every worker hears for itself that the first trainer has left, one perhaps after the second one has come.
    with Publisher(weights, [two], timeout_s=10, takeover=True) as publisher:
        publisher.connect()
        assert publisher.members == {"two": "dirty"}
        assert publisher.publish().number == (8 if found == "another version" else 2)
        assert publisher.members == {"two": "ready"}


def test_a_new_trainer_without_a_log_uses_no_number_again(make: Make) -> None:
    """A version that was live in one engine for a moment and taken back is heard of from that engine alone."""
    one, other, weights = make("one"), make("other"), values()
    with Publisher(weights, [one, other], timeout_s=10) as publisher:
        first = publisher.publish()
        other.refuse("commit")
        step(weights)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert caught.value.serving == dict.fromkeys(("one", "other"), first.version)
    other.refuse()
    with Publisher(values(), [one, other], timeout_s=10, takeover=True) as publisher:
        assert publisher.publish().number == 3
    with Publisher(values(), [one, other], timeout_s=10, takeover=True) as publisher:
        assert publisher.publish().number == 4
