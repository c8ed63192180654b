"""Attempts to have an engine back are called off by ``remove()`` and ``close()``, whatever they wait for; each alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.control.coordinator import Coordinator
from weightcast.deadline import CALLED_OFF_HINT, Deadline
from weightcast.errors import DeadlineExceeded
from weightcast.receiver.worker_round import RoundId, WorkerRound
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients.in_loop import AsyncEngineClient
from weightcast.trainer.clients.in_process import InProcessEngineClient
from weightcast.transports.together import Together

LONG_S = 600.0
"""A wait that is not woken fails the test by the suite's own limit."""
HANG_S = 30.0


class SilentEngine:
    """An engine object that answers no call until ``answers`` is set."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()

    def get_world_size(self) -> int:
        self.asked.set()
        self.answers.wait(LONG_S)
        return 1

    def init_weight_transfer_engine(self, init_info: Any, /) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any, /) -> None: ...
    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
    def shutdown_weight_transfer_engine(self) -> None: ...
    def status(self) -> SimpleNamespace:
        return SimpleNamespace(weight_version="default", digest=None, dirty=False, ready=True)

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def silent() -> Iterator[list[SilentEngine]]:
    engines = [SilentEngine(), SilentEngine()]
    yield engines
    for engine in engines:
        engine.answers.set()


def test_remove_and_close_end_attempts_at_once(silent: list[SilentEngine]) -> None:
    tensors = {"w": torch.randn(300)}
    model = DictModel({"w": torch.randn(300)})
    clients = [InProcessEngineClient(engine) for engine in silent]
    engines = [LocalEngine("well", [model], mode="staged"), *clients]
    with ThreadPoolExecutor(1) as pool:
        publisher = Publisher(tensors, engines, timeout_s=LONG_S, require="live")
        for timeout_s in (
            3,
            20,
        ):  # all are asked in the first; in the second the silent ones have a whole timeout beside it
            tensors["w"].normal_()
            publisher.publish(timeout_s=timeout_s)
            assert model.holds(tensors)
        assert all(engine.asked.is_set() for engine in silent)
        attempts = publisher._part._presence._rejoiner._attempts  # type: ignore[union-attr]
        pool.submit(publisher.remove, clients[0].name).result(HANG_S)
        assert not attempts[clients[1].name].future.done(), "the other's attempt goes on"
        tensors["w"].normal_()
        publisher.publish(timeout_s=20)
        assert model.holds(tensors)
        pool.submit(publisher.close).result(HANG_S)


def in_process(deadline: Deadline, engine: SilentEngine) -> None:
    InProcessEngineClient(engine).world_size(deadline)


def in_loop(deadline: Deadline, engine: SilentEngine) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def get_world_size() -> int:
        engine.asked.set()
        await asyncio.sleep(LONG_S)
        return 1

    try:
        AsyncEngineClient(SimpleNamespace(get_world_size=get_world_size), loop).world_size(deadline)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(HANG_S)
        loop.close()


def members(deadline: Deadline, engine: SilentEngine) -> None:
    coordinator = Coordinator()
    try:
        engine.asked.set()
        coordinator.wait_members("nobody", 1, deadline)
    finally:
        coordinator.close()


def approval(deadline: Deadline, engine: SilentEngine) -> None:
    engine.asked.set()
    WorkerRound().wait_for_approval(RoundId(epoch=1, round=1), deadline)


def together(deadline: Deadline, engine: SilentEngine) -> None:
    engine.asked.set()
    Together(2).do(0, "the others", deadline, lambda: None, lambda: None)


@pytest.mark.parametrize("wait", [in_process, in_loop, members, approval, together])
def test_waits_hear_that_they_are_called_off(
    wait: Callable[[Deadline, SilentEngine], None], silent: list[SilentEngine]
) -> None:
    whole = Deadline(LONG_S)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait, whole.part(0.5), silent[0])
        assert silent[0].asked.wait(HANG_S)
        assert not waiting.done()
        whole.cancel()
        with pytest.raises(DeadlineExceeded, match="called off") as caught:
            waiting.result(HANG_S)
        assert caught.value.hint == CALLED_OFF_HINT
