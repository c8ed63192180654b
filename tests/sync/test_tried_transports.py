"""What is chosen was tried: where memory cannot be shared, or not be made to be, the next transport takes its place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import NotShared, TransportError
from weightcast.layout.memory import Memory
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.peer_engine import PeerEngine
from weightcast.transports import shm
from weightcast.transports.shm import ShmTransport

PR_SET_DUMPABLE = 4
SHAPES = {"w": ((300, 17), "float32"), "b": ((9,), "bfloat16")}


def fresh() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(300, 17), "b": torch.randn(9).bfloat16()}


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}


@pytest.fixture
def stranger() -> Iterator[PeerEngine]:
    """An engine on this host that may not look into this process, as one with other capabilities may not."""
    libc = ctypes.CDLL(None)
    with PeerEngine("stranger") as engine:
        engine.build(SHAPES)
        engine.peer.call("drop_capabilities")
        libc.prctl(PR_SET_DUMPABLE, 0)
        try:
            yield engine
        finally:
            libc.prctl(PR_SET_DUMPABLE, 1)


def test_an_engine_that_may_not_open_shared_memory_gets_the_weights_over_tcp(stranger: PeerEngine) -> None:
    tensors, model = fresh(), DictModel(fresh())
    with Publisher(tensors, [stranger, LocalEngine("own", [model])], timeout_s=20) as publisher:
        for _ in range(3):
            tensors.update(fresh())
            report = publisher.publish()
            assert stranger.peer.call("contents") == contents(tensors)
            assert model.holds(tensors)
            workers = {engine.name: engine.workers[0] for engine in report.engines}
            assert workers["own"].transport == "shm"
            assert workers["stranger"].transport == "tcp"
            assert "shm: cannot open the shared memory of trainer process" in workers["stranger"].reason


def test_shared_memory_that_was_asked_for_is_refused_with_the_reason(stranger: PeerEngine) -> None:
    with (
        Publisher(fresh(), [stranger], transport="shm", timeout_s=20) as publisher,
        pytest.raises(NotShared, match="cannot open") as refusal,
    ):
        publisher.connect()
    assert "another transport" in str(refusal.value)


def test_shared_memory_that_cannot_be_had_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShmTransport, memory: Memory) -> Memory:
        raise TransportError("no 9 MiB of shared memory for the weights")

    tensors, model = fresh(), DictModel(fresh())
    with monkeypatch.context() as patched:
        patched.setattr(shm.ShmTransport, "adopt", full)
        with Publisher(tensors, [LocalEngine("a", [model])], timeout_s=20) as publisher:
            report = publisher.publish()
            worker = report.engines[0].workers[0]
            assert worker.transport == "tcp"
            assert "shm: no 9 MiB of shared memory" in worker.reason
            assert model.holds(tensors)
        with (
            Publisher(tensors, [LocalEngine("b", [model])], transport="shm", timeout_s=20) as publisher,
            pytest.raises(TransportError, match="no 9 MiB"),
        ):
            publisher.connect()


def test_engines_of_other_transports_go_on_where_one_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under require="live" an engine that has to do with shared memory is no matter for one that has not."""
    tensors, near, far = fresh(), DictModel(fresh()), DictModel(fresh())
    engines = [LocalEngine("near", [near]), LocalEngine("far", [far])]
    monkeypatch.setattr(
        ShmTransport, "adopt", lambda *_: (_ for _ in ()).throw(TransportError("no shared memory today"))
    )
    with Publisher(tensors, engines, timeout_s=20, require="live") as publisher:
        for _ in range(2):
            tensors.update(fresh())
            assert publisher.publish().ok
            assert near.holds(tensors)
            assert far.holds(tensors)
