"""What lies beside an engine's weights goes when its trainer has left, unless a round may still be taken back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from tests.support.footprint import Footprint

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import RoundFailed, StateError
from weightcast.receiver import session
from weightcast.testing.local_engine import DictModel, LocalEngine

MIB = 1 << 20
NBYTES = 48 * MIB
"""Larger than anything that malloc keeps for itself when it is freed."""


def fresh() -> dict[str, torch.Tensor]:
    return {"embed": torch.randn(NBYTES // 4 // 64, 64), "norm": torch.randn(64)}


def refill(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.copy_(torch.randn(tensor.shape))


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def is_alone(engine: LocalEngine) -> bool:
    return not any(worker.receiver.has_session for worker in engine.workers)


@pytest.mark.parametrize(("kind", "transport"), [("rebound", "shm"), ("exchanged", "tcp"), ("loader", "shm")])
def test_nothing_stays_when_trainers_come_and_go(kind: str, transport: str) -> None:
    """After a swap by rebinding the shadow's storages are the live ones, and what was live has to go."""
    weights = fresh()
    through = ("norm",) if kind == "loader" else ()
    engine = LocalEngine(
        "a", [DictModel(weights, relocatable=kind == "rebound", through_loader=through)], mode="staged"
    )
    (model,), (worker,) = engine.models, engine.workers
    with Publisher(weights, [engine], timeout_s=20, transport=transport) as publisher:
        publisher.publish()
        engine.stop()
    alone = Footprint.now()
    for num_rounds in (1, 2):
        with Publisher(weights, [engine], timeout_s=20, transport=transport) as publisher:
            for _ in range(num_rounds):
                refill(weights)
                version = publisher.publish().version
        until(lambda: is_alone(engine))
        until(lambda: not Footprint.now().growth(alone, NBYTES // 4))
        assert model.holds(weights)
        assert (worker.weight_version, worker.dirty) == (version, False)


@pytest.mark.parametrize("through", [(), ("norm",)], ids=["direct", "loader"])
def test_the_next_trainer_can_return_to_what_the_one_before_left(through: tuple[str, ...]) -> None:
    weights = fresh()
    engine = LocalEngine("a", [DictModel(weights, through_loader=through)], mode="staged")
    other = LocalEngine("b", [DictModel(weights)], mode="staged")
    for _ in range(2):
        refill(weights)
        with Publisher(weights, [engine, other], timeout_s=20) as publisher:
            version = publisher.publish().version
        before = {name: tensor.clone() for name, tensor in weights.items()}
        until(lambda: is_alone(engine))
        with Publisher(weights, [engine, other], timeout_s=20) as publisher:
            publisher.connect()
            refill(weights)
            other.refuse("commit")
            with pytest.raises(RoundFailed):
                publisher.publish()
            other.refuse()
            assert engine.models[0].holds(before)
            assert engine.workers[0].weight_version == version


def test_a_publisher_that_is_closed_in_a_round_leaves_the_way_back_open() -> None:
    """One engine has committed, the other one cannot: the first is still to be taken back when goodbye has come."""
    weights = fresh()
    engine, other = (LocalEngine(name, [DictModel(weights)], mode="staged") for name in "ab")
    publisher = Publisher(weights, [engine, other], timeout_s=20)
    version = publisher.publish().version
    before = {name: tensor.clone() for name, tensor in weights.items()}
    refill(weights)

    def close_then_refuse(phase: str) -> None:
        if phase == "commit":
            until(lambda: engine.workers[0].weight_version != version)
            closing = threading.Thread(target=publisher.close)
            closing.start()
            until(lambda: not engine.workers[0].receiver.joined)
            closing.join()
            time.sleep(0.2)
            other.refuse("commit")
            other.before(phase)

    other.before = close_then_refuse
    with pytest.raises((RoundFailed, StateError)):
        publisher.publish()
    assert engine.workers[0].weight_version == version
    assert engine.models[0].holds(before)


def test_a_trainer_whose_connection_breaks_may_take_back_while_its_round_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from the engine a trainer that was killed is one that cannot be heard: it might still call."""
    monkeypatch.setattr(session, "WAY_BACK_S", 0.3)
    weights = fresh()
    engine = LocalEngine("a", [DictModel(weights)], mode="staged")
    (worker,) = engine.workers
    publisher = Publisher(weights, [engine], timeout_s=20)
    version = publisher.publish().version
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for taken_back in (True, False):
        refill(weights)
        latest = publisher.publish(timeout_s=4.0).version
        id = worker.receiver._round.id
        publisher._part._coordinator._pump.close()  # type: ignore[union-attr]
        until(lambda: not worker.receiver.joined)
        if taken_back:
            engine.rollback(id.epoch, id.round, Deadline(20))
            assert engine.models[0].holds(before)
        assert worker.receiver.has_session, "its round's time is not over"
        until(lambda: is_alone(engine))
        assert worker.weight_version == (version if taken_back else latest)
        with pytest.raises(StateError, match="no trainer"):
            engine.rollback(id.epoch, id.round, Deadline(20))
        assert engine.models[0].holds(before if taken_back else weights)
        publisher.close()
        publisher = Publisher(weights, [engine], timeout_s=20)
    publisher.publish()
    assert engine.models[0].holds(weights)
    publisher.close()
