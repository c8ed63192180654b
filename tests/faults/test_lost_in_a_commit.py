"""A worker that is lost while its engine's answer to the commit is awaited: the answer would come at the deadline only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from tests.support.callers import serving

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, RoundFailed
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

TIMEOUT_S = 300.0


def values() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(64, 4), "b": torch.randn(6)}


class BehindAFront(LocalEngine):
    """An engine whose front keeps a commit's connection open while one of its workers dies."""

    front = ""

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if not self.front:
            return super().commit(order, deadline)
        victim = self.workers[-1].receiver
        threading.Timer(0.3, victim.leave).start()
        return HttpEngineClient(self.front).commit(order, deadline)


@pytest.fixture(params=[1, 2])
def engine(request: pytest.FixtureRequest) -> Iterator[BehindAFront]:
    made = BehindAFront("e", [DictModel(values()) for _ in range(request.param)])
    yield made
    made.stop()


@pytest.mark.timeout(60)
def test_the_wait_for_its_answer_ends(engine: BehindAFront) -> None:
    ended = threading.Event()

    def silent(caller: socket.socket, stop: threading.Event) -> None:
        while not stop.is_set() and not ended.is_set():
            try:
                if not caller.recv(65536):
                    return
            except TimeoutError:
                continue

    weights = values()
    with Publisher(weights, [engine], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
        with serving(silent) as engine.front:
            weights.update(values())
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
            ended.set()
        (cause,) = caught.value.causes.values()
        assert isinstance(cause, PeerLost), cause
        assert (cause.worker, cause.phase) == (len(engine.workers) - 1, "commit")
        engine.front = ""
        assert publisher.publish().digests_match
        assert all(model.holds(weights) for model in engine.models)
