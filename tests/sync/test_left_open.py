"""Updates that nobody finishes: a client that died between two calls, and a commit that outlasts its order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from weightcast import Publisher
from weightcast.engines.embedded import AsyncLLM
from weightcast.errors import RoundFailed, StateError
from weightcast.receiver.receiver import Receiver
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.trainer.clients import AsyncEngineClient


def fresh() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(8, 3), "b": torch.randn(5)}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine("e", [DictModel(fresh())])
    yield engine
    engine.stop()


@pytest.mark.parametrize("takeover", [False, True])
def test_a_trainer_that_joins_closes_what_a_dead_client_left_open(engine: LocalEngine, takeover: bool) -> None:
    with Publisher(fresh(), engines=[engine], timeout_s=10) as publisher:
        publisher.publish()
        engine.workers[0].start_weight_update()
    weights = fresh()
    with Publisher(weights, engines=[engine], timeout_s=10, takeover=takeover) as publisher:
        assert publisher.publish().digests_match
        assert engine.models[0].holds(weights)


def test_the_update_of_a_living_trainer_is_not_closed_by_another(engine: LocalEngine) -> None:
    with Publisher(fresh(), engines=[engine], timeout_s=10) as publisher:
        publisher.publish()
        engine.workers[0].start_weight_update()
        with (
            Publisher(fresh(), engines=[engine], timeout_s=5) as other,
            pytest.raises(StateError, match="another trainer"),
        ):
            other.connect()
        with pytest.raises(StateError, match="open already"):
            engine.workers[0].start_weight_update()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def test_an_order_that_outlasts_its_deadline_is_finished(
    loop: asyncio.AbstractEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    llm = AsyncLLM(path, weight_transfer_config={"backend": "weightcast", "mode": "staged"})
    commit, slow = Receiver.commit, threading.Event()

    def slowly(*arguments: object) -> None:
        if slow.is_set():
            time.sleep(1.5)
        commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Receiver, "commit", slowly)
    weights = random_state_dict(path)
    with Publisher(weights, [AsyncEngineClient(llm, loop)], timeout_s=30) as publisher:
        publisher.publish()
        slow.set()
        weights.update(random_state_dict(path))
        with pytest.raises(RoundFailed):
            publisher.publish(timeout_s=0.6)
        slow.clear()
        report = publisher.publish()
        assert report.digests_match
        assert llm.engine.weight_version == report.version
        assert not llm.engine.paused
    with Publisher(weights, [AsyncEngineClient(llm, loop)], timeout_s=30) as publisher:
        assert publisher.publish().digests_match
    llm.engine.shutdown()


def test_the_trainers_order_closes_an_update_that_a_client_of_the_same_engine_left_open(
    loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    llm = AsyncLLM(path)
    weights = random_state_dict(path)
    with Publisher(weights, [AsyncEngineClient(llm, loop)], timeout_s=30) as publisher:
        publisher.publish()
        asyncio.run_coroutine_threadsafe(llm.start_weight_update(), loop).result(10)
        weights.update(random_state_dict(path))
        assert publisher.publish().digests_match
    llm.engine.shutdown()
