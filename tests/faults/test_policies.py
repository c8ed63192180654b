"""Who takes part in a round, who is named when it fails, and how numbers go on: over engines of this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import EngineError, RoundFailed, StateError
from weightcast.testing.local_engine import DictModel, LocalEngine

SHAPES = {"embed": (17, 8), "up": (24, 8), "down": (8, 24), "norm": (8,)}
Tensors = dict[str, torch.Tensor]
Fleet = Callable[..., dict[str, LocalEngine]]


def values() -> Tensors:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def weights() -> Tensors:
    return values()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made: dict[str, LocalEngine] = {}

    def make(*names: str, **modes: str) -> dict[str, LocalEngine]:
        for name in names:
            made[name] = LocalEngine(name, [DictModel(values())], mode=modes.get(name, "staged"))
        return made

    yield make
    for engine in made.values():
        engine.stop()


def publisher(weights: Tensors, engines: dict[str, LocalEngine], **options: Any) -> Publisher:
    return Publisher(weights, list(engines.values()), **{"timeout_s": 20.0, **options})


def step(weights: Tensors) -> Tensors:
    """New values for the publisher's tensors; returns a copy."""
    weights.update(values())
    return {name: value.clone() for name, value in weights.items()}


def number_of(version: str) -> int:
    return int(version.partition("-")[0])


def test_all_means_that_one_failure_stops_everybody(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b", "c")
    with publisher(weights, engines) as trainer:
        before = step(weights)
        first = trainer.publish()
        engines["b"].refuse("commit")
        step(weights)
        with pytest.raises(RoundFailed, match="no commit today") as caught:
            trainer.publish()
        assert set(caught.value.causes) == {"b"}
        assert caught.value.serving == dict.fromkeys("abc", first.version)
        assert caught.value.dirty == ()
        assert caught.value.round == 2
        assert all(engine.models[0].holds(before) for engine in engines.values())


def test_live_means_that_the_others_go_on_and_the_lost_one_comes_back(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines, require="live") as trainer:
        trainer.publish()
        engines["b"].refuse("commit")
        wanted = step(weights)
        report = trainer.publish()
        assert report.outcome == "committed"
        assert not report.ok
        assert {engine.name: engine.ok for engine in report.engines} == {"a": True, "b": False}
        assert "no commit today" in str(next(e.error for e in report.engines if e.name == "b"))
        assert engines["a"].models[0].holds(wanted)
        assert number_of(trainer.versions["b"]) == 1
        engines["b"].refuse()
        wanted = step(weights)
        assert trainer.publish().ok
        assert all(engine.models[0].holds(wanted) for engine in engines.values())


def test_live_fails_when_nobody_is_left(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines, require="live") as trainer:
        first = trainer.publish()
        for engine in engines.values():
            engine.refuse("commit")
        step(weights)
        with pytest.raises(RoundFailed) as caught:
            trainer.publish()
        assert set(caught.value.causes) == {"a", "b"}
        assert set(caught.value.serving.values()) == {first.version}


def test_a_joiner_is_brought_to_what_the_fleet_serves_beside_the_others(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines) as trainer:
        wanted = step(weights)
        first = trainer.publish()
        commits = {name: engine.workers[0].receiver.num_commits for name, engine in engines.items()}
        joiner = fleet("c")["c"]
        report = trainer.add(joiner)
        assert report is not None
        assert report.version == first.version
        assert joiner.models[0].holds(wanted)
        assert set(trainer.versions.values()) == {first.version}
        assert {name: engines[name].workers[0].receiver.num_commits for name in commits} == commits
        step(weights)
        assert trainer.publish().number == 2


def test_a_joiner_waits_for_the_next_version_when_training_went_on(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a")
    with publisher(weights, engines) as trainer:
        trainer.publish()
        wanted = step(weights)
        joiner = fleet("c")["c"]
        assert trainer.add(joiner) is None
        assert trainer.versions["c"] == "default"
        assert trainer.publish().ok
        assert joiner.models[0].holds(wanted)


def test_a_joiner_that_cannot_be_brought_to_what_the_fleet_serves_leaves_the_fleet_as_it_was(
    weights: Tensors, fleet: Fleet
) -> None:
    engines = fleet("a")
    with publisher(weights, engines) as trainer:
        first = trainer.publish()
        joiner = fleet("c")["c"]
        joiner.refuse("commit")
        with pytest.raises(RoundFailed, match="no commit today"):
            trainer.add(joiner)
        assert trainer.versions == {"a": first.version}
        step(weights)
        assert trainer.publish().ok
        joiner.refuse()
        assert trainer.add(joiner) is not None
        assert trainer.members == {"a": "ready", "c": "ready"}


def test_live_connects_although_an_engine_cannot_be_brought_to_what_the_others_serve(
    weights: Tensors, fleet: Fleet
) -> None:
    engines = fleet("a")
    with publisher(weights, engines) as trainer:
        first = trainer.publish()
    engines = fleet("b")
    engines["b"].refuse("commit")
    with publisher(weights, engines) as trainer, pytest.raises(RoundFailed, match="no commit today"):
        trainer.connect()
    with publisher(weights, engines, require="live") as trainer:
        trainer.connect()
        assert trainer.versions == {"a": first.version, "b": "default"}
        engines["b"].refuse()
        step(weights)
        assert trainer.publish().ok


def test_a_joiner_that_cannot_join_leaves_the_fleet_as_it_was(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a")
    with publisher(weights, engines) as trainer:
        trainer.publish()
        joiner = fleet("c")["c"]
        joiner.refuse("init")
        with pytest.raises(EngineError, match="no init today"):
            trainer.add(joiner)
        assert set(trainer.members) == {"a"}
        with pytest.raises(StateError, match="already"):
            trainer.add(engines["a"])
        step(weights)
        assert trainer.publish().ok


def test_who_is_removed_keeps_what_it_serves(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines) as trainer:
        before = step(weights)
        trainer.publish()
        trainer.remove("b")
        step(weights)
        report = trainer.publish()
        assert [engine.name for engine in report.engines] == ["a"]
        assert engines["b"].models[0].holds(before)
        with pytest.raises(StateError, match="not in the fleet"):
            trainer.remove("b")


def test_the_next_trainer_learns_what_is_served_and_numbers_go_on(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines) as trainer:
        for _ in range(3):
            step(weights)
            last = trainer.publish()
    with publisher(values(), engines) as other:
        other.connect()
        assert set(other.versions.values()) == {last.version}
        assert set(other.members.values()) == {"ready"}
        assert other.publish().number == 4


def test_a_number_that_somebody_saw_is_never_used_again(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines) as trainer:
        trainer.publish()
        engines["b"].refuse("commit")
        numbers = []
        for _ in range(3):
            step(weights)
            with pytest.raises(RoundFailed) as caught:
                trainer.publish()
            numbers.append(caught.value.message)
        assert numbers == [f"version {number} was not published" for number in (2, 3, 4)]
        engines["b"].refuse()
        assert trainer.publish().number == 5


def test_a_commit_that_can_not_be_taken_back_is_named_and_repaired(weights: Tensors, fleet: Fleet) -> None:
    engines = fleet("a", "b")
    with publisher(weights, engines) as trainer:
        first = trainer.publish()
        engines["a"].refuse("rollback", "status")

        def refuse_after_a(phase: str) -> None:
            """Both are ordered to commit at once; a is not called off because b said no before a began."""
            if phase == "commit":
                end = time.monotonic() + 10
                while engines["a"].workers[0].weight_version == first.version and time.monotonic() < end:
                    time.sleep(0.005)
                raise EngineError("no commit today")

        engines["b"].before = refuse_after_a
        step(weights)
        with pytest.raises(RoundFailed) as caught:
            trainer.publish()
        assert caught.value.serving == {"a": "unknown", "b": first.version}
        assert {"a", "b"} == set(caught.value.causes)
        assert trainer.members == {"a": "unknown", "b": "ready"}
        for engine in engines.values():
            engine.refuse()
        wanted = step(weights)
        assert trainer.publish().ok
        assert all(engine.models[0].holds(wanted) for engine in engines.values())
        assert set(trainer.members.values()) == {"ready"}


def test_past_the_point_of_return_the_error_says_who_serves_what(weights: Tensors, fleet: Fleet) -> None:
    """In-place engines commit first and keep no version n, so a staged one that then fails parts the fleet."""
    engines = fleet("now", "later", now="in_place")
    with publisher(weights, engines) as trainer:
        before = step(weights)
        first = trainer.publish()
        engines["later"].refuse("commit")
        after = step(weights)
        with pytest.raises(RoundFailed) as caught:
            trainer.publish()
        assert number_of(caught.value.serving["now"]) == 2
        assert caught.value.serving["later"] == first.version
        assert engines["now"].models[0].holds(after)
        assert engines["later"].models[0].holds(before)
        engines["later"].refuse()
        wanted = step(weights)
        report = trainer.publish()
        assert report.number == 3
        assert all(engine.models[0].holds(wanted) for engine in engines.values())


def test_arguments_are_checked(weights: Tensors, fleet: Fleet) -> None:
    engine = fleet("a")["a"]
    for options in ({"require": "most"}, {"pause": "never"}, {"mode": "magic"}, {"timeout_s": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options)).removesuffix("_s")):
            Publisher(weights, [engine], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        Publisher(weights, [engine, engine])
