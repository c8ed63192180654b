"""In-place commits that break off: an engine is dirty exactly when something of its live weights may have been written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import RoundFailed, StateError, TransportError, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.receiver import pairs
from weightcast.receiver.session import Session
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports.cuda_ipc import CudaIpcOffer, CudaIpcWorkerEnd
from weightcast.transports.gpu_exports import MappingOffer
from weightcast.transports.guard import EndGuard
from weightcast.transports.shm import ShmWorkerEnd
from weightcast.transports.tcp import TcpWorkerEnd

Tensors = dict[str, torch.Tensor]


def values() -> Tensors:
    return {"w": torch.randn(64, 4), "b": torch.randn(6)}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("here", [DictModel(values())], mode="in_place")
    yield made
    made.stop()


def fail_once(weights: Tensors, publisher: Publisher) -> tuple[Tensors, RoundFailed]:
    """What the engine held before a round that fails, and the error."""
    before = {name: value.clone() for name, value in weights.items()}
    weights.update(values())
    with pytest.raises(RoundFailed) as caught:
        publisher.publish(timeout_s=20)
    return before, caught.value


def test_a_trainer_lost_before_the_first_byte_leaves_the_engine_clean(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = values()
    receive = Session.receive

    def lost(self: Session, *arguments: Any) -> Any:
        self._on_lost("the trainer's connection closed")
        return receive(self, *arguments)

    with Publisher(weights, [engine], timeout_s=20, transport="tcp") as publisher:
        first = publisher.publish()
        with monkeypatch.context() as patch:
            patch.setattr(Session, "receive", lost)
            before, error = fail_once(weights, publisher)
        assert error.dirty == ()
        assert not engine.workers[0].dirty
        assert engine.workers[0].weight_version == first.version
        assert engine.models[0].holds(before)
    with Publisher(weights, [engine], timeout_s=20, transport="tcp") as publisher:
        assert publisher.publish().number == 3


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_copy_out_of_shared_memory_is_dirty_from_its_first_step_on(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    weights = values()
    check = EndGuard.check
    left = [0]

    def stops(self: EndGuard) -> None:
        if "worker" in self._end:
            if not left[0]:
                raise TransportError("broken off")
            left[0] -= 1
        check(self)

    compiled = ShmWorkerEnd._compiled

    def twice(self: ShmWorkerEnd, *arguments: Any) -> Any:
        return 2 * compiled(self, *arguments)

    monkeypatch.setattr(ShmWorkerEnd, "_compiled", twice)
    with Publisher(weights, [engine], timeout_s=20, transport="shm") as publisher:
        publisher.publish()
        with monkeypatch.context() as patch:
            left[0] = 1 + steps_before  # the first check is that of ``use``
            patch.setattr(EndGuard, "check", stops)
            before, error = fail_once(weights, publisher)
        assert error.dirty == (("here",) if steps_before else ())
        assert engine.workers[0].dirty == bool(steps_before)
        assert steps_before or engine.models[0].holds(before)
        assert publisher.publish().ok
        assert not engine.workers[0].dirty


def test_a_transport_that_cannot_tell_counts_as_torn(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = values()

    def breaks(*_: object) -> int:
        raise TransportError("broken off")

    with Publisher(weights, [engine], timeout_s=20, transport="tcp") as publisher:
        publisher.publish()
        with monkeypatch.context() as patch:
            patch.setattr(TcpWorkerEnd, "receive", breaks)
            _, error = fail_once(weights, publisher)
        assert error.dirty == ("here",)
        assert publisher.publish().ok


def test_an_end_of_gpu_memory_that_is_not_connected_has_written_nothing() -> None:
    mapping = MappingOffer(process="", segments=(), spans=(), is_arena=True)
    offer = CudaIpcOffer(mapping=mapping, address="127.0.0.1", port=1, secret=b"")
    end = CudaIpcWorkerEnd((), offer)
    assert end.has_written
    with pytest.raises(StateError, match="before connect"):
        end.receive_proven(Memory([torch.zeros(4, dtype=torch.uint8)]), Manifest.of([]), Deadline(1))
    assert not end.has_written


def test_an_epoch_is_not_set_up_over_a_transfer_that_does_not_end(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "RELEASE_TIMEOUT_S", 0.1)
    weights = values()
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        publisher.publish()
        session = engine.workers[0].receiver._session
        assert session is not None
        session.pairs._using += 1
        for link in publisher._first_rank("engines").engines:
            link.broken = "tried anew"
        with pytest.raises(WeightcastError, match="does not end"):
            publisher.publish(timeout_s=20)
        session.pairs._using -= 1
        assert publisher.publish().ok
