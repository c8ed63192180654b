"""Every kind of client wakes up its engine, names what sleeps on, and says so where the engine cannot sleep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.commit_ways import (
    RAY,
    Actor,
    Loop,
    Way,
    http,
    in_loop,
    in_process,
    ray,
    vllm_dev,
    vllm_in_loop,
    vllm_offline,
    vllm_server,
)
from tests.support.scripted_vllm import ERAS, ScriptedLLM, ScriptedVllm

from weightcast.deadline import Deadline
from weightcast.errors import EngineError, Unsupported
from weightcast.trainer.clients import AsyncVllmClient, RayEngineClient

SOON = 10.0
Open = Callable[[Loop], AbstractContextManager[Way]]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setitem(sys.modules, "ray", RAY)
    loop = Loop()
    yield loop
    loop.close()


def lets_sleep(engine: Any) -> Any:
    """Start vLLM's sleep mode, and go to sleep."""
    config = engine.vllm_config if isinstance(engine, ScriptedVllm) else engine.llm_engine.vllm_config
    config.model_config = SimpleNamespace(model="scripted", enable_sleep_mode=True)
    for worker in engine.workers:
        worker.asleep = ("cudagraph", "kv_cache", "weights")
    return engine


def wake(way: Way, *tags: str) -> tuple[str, ...]:
    return way.client.wake(tags, Deadline(SOON))


@pytest.mark.parametrize("open_way", [vllm_server, vllm_in_loop, vllm_dev, vllm_offline])
def test_weights_wake_first_and_the_rest_later(loop: Loop, open_way: Open) -> None:
    """What other tags sleep come back with either; what is awake is not woken up once more, which vLLM 0.26 could not take."""
    with open_way(loop) as way:
        engine: Any = lets_sleep(way.engine)  # type: ignore[attr-defined]
        for _ in range(2):
            assert wake(way, "weights") == ("kv_cache",)
            assert engine.workers[0].asleep == ("kv_cache",)
        for _ in range(2):
            assert wake(way) == ()
            assert engine.workers[0].asleep == ()
        lets_sleep(engine)
        assert wake(way) == ()


@pytest.mark.parametrize("open_way", [vllm_server, vllm_in_loop, vllm_dev, vllm_offline])
def test_what_vllm_says_when_memory_is_short_is_told(loop: Loop, open_way: Open) -> None:
    with open_way(loop) as way:
        engine: Any = lets_sleep(way.engine)  # type: ignore[attr-defined]

        def short(*_: Any) -> Any:
            raise RuntimeError("CUDA Error: out of memory")

        engine.wake_up = short
        with pytest.raises(EngineError, match="out of memory"):
            wake(way, "weights")
        assert engine.workers[0].asleep == ("cudagraph", "kv_cache", "weights")


@pytest.mark.parametrize("open_way", [http, in_loop, in_process, ray, vllm_server, vllm_in_loop, vllm_offline])
def test_an_engine_that_cannot_sleep_says_so(loop: Loop, open_way: Open) -> None:
    with open_way(loop) as way:
        with pytest.raises(Unsupported, match="cannot sleep") as caught:
            wake(way)
        assert "without wake=" in str(caught.value)


@pytest.mark.parametrize("era", ERAS)
def test_every_replica_is_woken_up(loop: Loop, era: str) -> None:
    engine = lets_sleep(ScriptedVllm(2, 2, era=era))
    client = AsyncVllmClient(engine, loop.loop)
    engine.workers[3].asleep = ("kv_cache", "weights")
    assert client.wake(("weights",), Deadline(SOON)) == ("kv_cache",)
    assert {worker.asleep for worker in engine.workers} == {("kv_cache",)}
    assert client.wake((), Deadline(SOON)) == ()
    assert {worker.asleep for worker in engine.workers} == {()}


def test_an_actor_wakes_its_engine(loop: Loop) -> None:
    llm = lets_sleep(ScriptedLLM(2))
    actor = Actor(llm)
    client = RayEngineClient(actor)
    assert client.wake(("weights",), Deadline(SOON)) == ("kv_cache",)
    assert client.wake((), Deadline(SOON)) == ()
    assert not any(worker.asleep for worker in llm.workers)
    actor.close()
