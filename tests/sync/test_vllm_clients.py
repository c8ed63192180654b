"""Clients of vLLM's engine objects: workers that fail, deadlines that pass at each step, and engines that hang."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from tests.support.scripted_vllm import ERAS, Failure, ScriptedLLM, ScriptedVllm

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, LoadError, StateError, Unsupported, WeightcastError
from weightcast.trainer.clients import (
    AsyncVllmClient,
    CommitOrder,
    InProcessEngineClient,
    RpcEngineClient,
    VllmClient,
)

DIRTY = Failure(dirty=True)
SOON = 20.0


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def commit(client: RpcEngineClient, number: int, timeout_s: float = SOON, **fields: str) -> None:
    client.commit(CommitOrder(epoch=1, round=number, version=f"{number}-x", **fields), Deadline(timeout_s))  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("era", ERAS)
def test_every_replicas_workers_are_asked(loop: asyncio.AbstractEventLoop, era: str) -> None:
    engine = ScriptedVllm(2, 2, era=era)
    client = AsyncVllmClient(engine, loop)
    client.init({}, Deadline(SOON))
    commit(client, 1)
    assert engine.versions == ["1-x"] * 4
    assert engine.label == ("default" if era == "0.26" else "1-x")
    assert not engine.paused


def test_an_answer_of_some_workers_only_is_refused(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm(1)
    engine.vllm_config.parallel_config.world_size_across_dp = 2
    with pytest.raises(Unsupported, match="1 of 2 workers answered"):
        AsyncVllmClient(engine, loop).init({}, Deadline(SOON))


def test_where_one_of_two_workers_fails_the_other_is_taken_back(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm(2)
    client = AsyncVllmClient(engine, loop)
    commit(client, 1)
    engine.workers[0].fails["commit"] = Failure()
    with pytest.raises(LoadError):
        commit(client, 2)
    assert engine.versions == ["1-x", "1-x"]
    assert (engine.label, engine.paused) == ("1-x", False)


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_a_dirty_engine_is_held_until_anybody_heals_it(loop: asyncio.AbstractEventLoop, pause: str) -> None:
    engine = ScriptedVllm()
    first, second = AsyncVllmClient(engine, loop), AsyncVllmClient(engine, loop)
    engine.workers[0].fails["commit"] = DIRTY
    with pytest.raises(LoadError):
        commit(first, 1, pause=pause)
    assert engine.paused
    assert first.status(Deadline(SOON))["dirty"]
    first.rollback(1, 1, Deadline(SOON))
    assert engine.paused, "a roll-back that has nothing to take back heals nothing"
    commit(second, 2, pause=pause)
    assert not engine.paused
    assert not engine.workers[0].held
    commit(first, 3)
    assert not engine.paused


def test_workers_of_two_versions_are_held(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm(2, in_place=True)
    client = AsyncVllmClient(engine, loop)
    engine.workers[1].fails["commit"] = Failure(kind="DeadlineExceeded")
    with pytest.raises(DeadlineExceeded):
        commit(client, 1)
    assert engine.versions == ["1-x", "default"]
    assert engine.paused
    assert client.status(Deadline(SOON))["dirty"]
    commit(client, 2)
    assert engine.versions == ["2-x", "2-x"]
    assert not engine.paused


def test_several_workers_are_paused_whatever_the_order_says(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm(2)
    commit(AsyncVllmClient(engine, loop), 1, pause="none")
    assert engine.calls.index("pause keep clear=True") < engine.calls.index("commit")
    assert not engine.paused


def test_a_pause_of_the_owner_stays_and_its_cache_is_forgotten(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm()
    asyncio.run_coroutine_threadsafe(engine.pause_generation(mode="keep", clear_cache=False), loop).result(5)
    commit(AsyncVllmClient(engine, loop), 1)
    assert engine.paused
    assert "pause keep clear=True" in engine.calls


@pytest.mark.parametrize("pause", ["keep", "none"])
def test_a_cache_that_vllm_keeps_fails_the_round(loop: asyncio.AbstractEventLoop, pause: str) -> None:
    engine = ScriptedVllm()
    client = AsyncVllmClient(engine, loop)
    commit(client, 1)
    engine.keeps_cache = True
    with pytest.raises(EngineError, match="Failed to reset"):
        commit(client, 2, pause=pause)
    assert not engine.paused
    assert engine.versions == ["1-x"], "nothing is computed with new weights and keys of the old ones"


@pytest.mark.parametrize("step", ["pause", "commit", "resume", "status"])
@pytest.mark.parametrize("seconds", [0.4, 2.0])
def test_an_overrun_at_any_step_freezes_nothing(loop: asyncio.AbstractEventLoop, step: str, seconds: float) -> None:
    """Shorter than what is left for letting the engine go on, and longer: then the next call does it."""
    engine = ScriptedVllm()
    client = AsyncVllmClient(engine, loop)
    commit(client, 1)
    engine.seconds[step] = seconds
    if step == "status":
        engine.workers[0].fails["commit"] = Failure()
    with pytest.raises(WeightcastError):
        commit(client, 2, 0.2, pause="wait")
    engine.seconds.clear()
    client.rollback(1, 2, Deadline(SOON))
    assert engine.versions == ["1-x"]
    assert not engine.paused
    commit(client, 3)
    assert not engine.paused


def test_what_vllm_raises_is_named(loop: asyncio.AbstractEventLoop) -> None:
    engine = ScriptedVllm()
    client = AsyncVllmClient(engine, loop)

    async def fails(*_: object) -> list[object]:
        raise RuntimeError("engine core is dead")

    engine.engine_core.call_utility_all_async = fails
    with pytest.raises(EngineError, match="engine core is dead") as caught:
        client.status(Deadline(SOON))
    assert caught.value.engine == client.name


def test_a_round_of_an_offline_engine() -> None:
    engine = ScriptedLLM(2)
    client = VllmClient(engine)
    client.init({}, Deadline(SOON))
    commit(client, 1)
    assert (engine.generate("a"), engine.label) == ("1-x", "1-x")
    assert threading.get_ident() not in engine.threads
    client.close()


@pytest.mark.parametrize("kind", ["dirty", "mixed"])
def test_an_offline_engine_takes_no_request_while_its_weights_are_of_no_version(kind: str) -> None:
    engine = ScriptedLLM(2, in_place=True)
    first, second = VllmClient(engine), VllmClient(engine)
    engine.workers[1].fails["commit"] = Failure(dirty=kind == "dirty")
    with pytest.raises(LoadError):
        commit(first, 1)
    with pytest.raises(StateError, match=r"publish\(\) that succeeds"):
        engine.generate("a")
    assert engine.llm_engine.requests == []
    with pytest.raises(StateError):
        first.rollback(1, 1, Deadline(SOON))
    with pytest.raises(StateError):
        engine.generate("a")
    commit(second, 2)
    assert engine.generate("a") == "2-x"
    first.close()
    second.close()


def test_an_offline_engine_that_hangs_ends_by_the_deadline() -> None:
    engine = ScriptedLLM()
    client = VllmClient(engine)
    commit(client, 1)
    engine.lets_go.clear()
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match="longer"):
            commit(client, 2, 0.5)
    engine.lets_go.set()
    assert eventually(lambda: client.status(Deadline(SOON))["weight_version"] == "2-x")
    client.rollback(1, 2, Deadline(SOON))
    assert engine.generate("a") == "1-x"
    client.close()


def test_a_model_of_this_process_is_worked_on_by_the_thread_that_calls() -> None:
    engine = ScriptedLLM(computes_here=True)
    client = VllmClient(engine)
    commit(client, 1)
    assert engine.threads == {threading.get_ident()}


def test_an_offline_engine_of_another_backend_is_refused() -> None:
    engine = ScriptedLLM()
    engine.llm_engine.vllm_config.weight_transfer_config = None
    with pytest.raises(StateError, match="weight-transfer-config"):
        VllmClient(engine).init({}, Deadline(SOON))
    assert engine.threads == set()


def test_a_cache_that_an_offline_engine_keeps_fails_the_round() -> None:
    engine = ScriptedLLM()
    engine.keeps_cache = True
    client = VllmClient(engine)
    with pytest.raises(EngineError, match="former weights"):
        commit(client, 1)
    client.close()


class HangingEngine:
    """An engine of this process whose calls wait for ``lets_go``."""

    def __init__(self) -> None:
        self.lets_go = threading.Event()
        self.calls: list[str] = []
        self.paused = False

    def _call(self, name: str) -> None:
        self.calls.append(name)
        assert self.lets_go.wait(10)

    def get_world_size(self) -> int:
        self._call("world_size")
        return 1

    def init_weight_transfer_engine(self, init_info: object, /) -> None:
        self._call("init")

    def start_weight_update(self) -> None:
        self._call("start")

    def update_weights(self, update_info: object, /) -> None:
        self._call("update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish")

    def shutdown_weight_transfer_engine(self) -> None:
        self._call("shutdown")

    def status(self) -> SimpleNamespace:
        self._call("status")
        return SimpleNamespace(weight_version="1-x", digest=None, dirty=False, ready=True)

    def is_paused(self) -> bool:
        return self.paused

    def pause_generation(self, mode: object, clear_cache: bool, /) -> None:
        self.paused = True

    def resume_generation(self) -> None:
        self.paused = False

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self._call("reset")
        return True


def test_an_engine_of_this_process_that_hangs_ends_by_the_deadline() -> None:
    engine = HangingEngine()
    client = InProcessEngineClient(engine)
    order = CommitOrder(epoch=1, round=1, version="1-x")
    for call in (
        lambda deadline: client.commit(order, deadline),
        client.world_size,
        lambda deadline: client.init({}, deadline),
        client.status,
        lambda deadline: client.rollback(1, 1, deadline),
    ):
        with pytest.raises(DeadlineExceeded, match="longer"):
            call(Deadline(1.0 if not engine.calls else 0.3))
    assert engine.calls == ["start"], "what was not begun in time is not done later"
    engine.lets_go.set()
    assert client.status(Deadline(SOON))["weight_version"] == "1-x"
    assert engine.calls == ["start", "update", "finish", "status", "status"]
    assert not engine.paused
    client.close()
