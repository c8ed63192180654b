"""A fleet behind HTTP: commits are ordered side by side on one thread, and each engine's fate is its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.support.served_local import ServedLocal

from weightcast import Publisher
from weightcast.errors import DeadlineExceeded, EngineError, PeerLost, RoundFailed
from weightcast.testing.local_engine import DictModel

SHAPES = {"a": (64, 32), "b": (7,)}
Fleet = Callable[..., list[ServedLocal]]


def values() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def serves(engine: ServedLocal, wanted: dict[str, torch.Tensor]) -> bool:
    live = engine.model.parameters()
    return all(torch.equal(live[name], value) for name, value in wanted.items())


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made: list[ServedLocal] = []

    def start(count: int, *, mode: str = "staged") -> list[ServedLocal]:
        made.extend(ServedLocal(DictModel(values()), mode=mode) for _ in range(count))
        return made

    yield start
    for engine in made:
        engine.close()


def publisher_of(engines: list[ServedLocal], source: dict[str, torch.Tensor], **settings: object) -> Publisher:
    return Publisher(source, [engine.url for engine in engines], token="t", timeout_s=20, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_engine_serves_what_was_published(fleet: Fleet, mode: str, transport: str) -> None:
    engines, source = fleet(5, mode=mode), values()
    with publisher_of(engines, source, transport=transport) as publisher:
        for _ in range(3):
            for value in source.values():
                value.normal_()
            report = publisher.publish()
            assert all(serves(engine, source) for engine in engines)
            assert all(engine.ok and engine.phases for engine in report.engines)
    assert [len(engine.orders) for engine in engines] == [3] * 5


def test_no_thread_is_there_for_each_engine(fleet: Fleet) -> None:
    """Counted while all commits wait for their answers; the servers' own threads are not the publisher's."""
    engines, source = fleet(12), values()
    all_there, counted = threading.Barrier(len(engines)), set[str]()

    def count() -> None:
        all_there.wait(20)
        counted.update(thread.name for thread in threading.enumerate() if thread.name.startswith("weightcast-round"))

    with publisher_of(engines, source) as publisher:
        publisher.publish()
        for engine in engines:
            engine.before_answer = count
        publisher.publish()
    assert len(counted) <= 1


def test_an_answer_that_is_lost_is_asked_for_again(fleet: Fleet) -> None:
    engines, source = fleet(4), values()
    with publisher_of(engines, source) as publisher:
        publisher.publish()
        engines[2].lose_answers = 2
        source["a"].normal_()
        publisher.publish()
    assert [len(engine.orders) for engine in engines] == [2, 2, 4, 2]
    assert all(serves(engine, source) for engine in engines)


def test_one_that_refuses_is_named_and_the_others_go_back(fleet: Fleet) -> None:
    engines, source = fleet(4), values()
    with publisher_of(engines, source) as publisher:
        before = publisher.publish()
        old = {name: value.clone() for name, value in source.items()}
        engines[1].engine.refuse("commit")
        source["a"].normal_()
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert set(caught.value.causes) == {engines[1].url}
        assert isinstance(caught.value.causes[engines[1].url], EngineError)
        assert set(caught.value.serving.values()) == {before.version}
        assert all(serves(engine, old) for engine in engines)
        engines[1].engine.refuse()
        publisher.publish()
        assert all(serves(engine, source) for engine in engines)


def test_one_that_refuses_holds_up_nobody_where_the_others_may_go_on(fleet: Fleet) -> None:
    engines, source = fleet(4), values()
    with publisher_of(engines, source, require="live") as publisher:
        publisher.publish()
        engines[1].engine.refuse("commit")
        source["a"].normal_()
        report = publisher.publish()
        assert [engine.ok for engine in report.engines] == [True, False, True, True]
        assert [serves(engine, source) for engine in engines] == [True, False, True, True]


def test_one_that_does_not_answer_ends_with_the_deadline(fleet: Fleet) -> None:
    engines, source = fleet(3), values()
    go_on = threading.Event()
    with publisher_of(engines, source) as publisher:
        publisher.publish()
        old = {name: value.clone() for name, value in source.items()}

        def wait() -> None:
            go_on.wait(20)

        engines[2].before_answer = wait
        source["a"].normal_()
        with pytest.raises(RoundFailed) as caught:
            publisher.publish(timeout_s=4)
        assert {name: type(cause) for name, cause in caught.value.causes.items()} == {engines[2].url: DeadlineExceeded}
        assert all(serves(engine, old) for engine in engines)
        go_on.set()


def test_a_worker_that_dies_ends_the_wait_for_its_engine(fleet: Fleet) -> None:
    engines, source = fleet(3), values()
    with publisher_of(engines, source) as publisher:
        publisher.publish()
        old = {name: value.clone() for name, value in source.items()}
        go_on = threading.Event()

        def die() -> None:
            engines[0].engine.stop()
            go_on.wait(20)

        engines[0].before_answer = die
        source["a"].normal_()
        with pytest.raises(RoundFailed) as caught:
            publisher.publish(timeout_s=15)
        go_on.set()
        ((name, cause),) = caught.value.causes.items()
        assert name == engines[0].url
        assert isinstance(cause, PeerLost), (
            "a WorkerLeft where its goodbye was heard before its connection was seen to end"
        )
        assert all(serves(engine, old) for engine in engines[1:])
