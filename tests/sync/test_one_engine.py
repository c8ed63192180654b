"""One engine given twice is told so at once, whichever way it is reached; under its first name it goes on."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.engines.base import InferenceEngine
from weightcast.engines.embedded import LLM, AsyncLLM
from weightcast.errors import InvalidInput, StateError
from weightcast.server import create_app
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.trainer.clients import AsyncEngineClient, RayEngineClient

TOLD = "are one engine"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "m", "qwen3")


@contextmanager
def served(engine: InferenceEngine) -> Iterator[int]:
    """The port of a server of the loopback interface."""
    config = uvicorn.Config(create_app(engine), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        asyncio.run(engine.shutdown())


@pytest.mark.parametrize("takeover", [False, True])
def test_one_server_under_two_names(path: Path, takeover: bool) -> None:
    weights = random_state_dict(path)
    llm = AsyncLLM(path, num_threads=1)
    with served(llm) as port:
        names = [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]
        with (
            Publisher(weights, names, timeout_s=30, takeover=takeover) as publisher,
            pytest.raises(StateError, match=TOLD) as caught,
        ):
            publisher.publish()
        assert all(name in str(caught.value) for name in names)
        with Publisher(weights, names[:1], timeout_s=30, takeover=takeover) as publisher:
            first = publisher.publish()
            with pytest.raises(StateError, match=TOLD):
                publisher.add(names[1])
            weights["model.norm.weight"].copy_(torch.randn_like(weights["model.norm.weight"]))
            assert publisher.publish().number == first.number + 1
            live = dict(llm.engine.model.named_parameters())["model.norm.weight"]
            assert torch.equal(live.detach(), weights["model.norm.weight"].to(live.dtype))


def test_one_url_that_is_not_in_a_list(path: Path) -> None:
    with pytest.raises(InvalidInput, match="engines is a list, not one URL") as caught:
        Publisher(random_state_dict(path), "http://user:password@127.0.0.1:8000", timeout_s=30)
    assert caught.value.field == "engines"
    assert "password" not in str(caught.value)


def test_one_object_twice(path: Path) -> None:
    weights = random_state_dict(path)
    llm = LLM(path)
    with pytest.raises(InvalidInput, match=TOLD):
        Publisher(weights, [llm, llm], timeout_s=30)
    with Publisher(weights, [llm], timeout_s=30) as publisher:
        publisher.publish()
        with pytest.raises(StateError, match=TOLD):
            publisher.add(llm)
        assert publisher.publish().number == 2
        assert len(publisher.versions) == 1
    llm.shutdown()


async def test_one_object_of_an_event_loop_twice(path: Path) -> None:
    engine = AsyncLLM(path, num_threads=1)
    try:
        with pytest.raises(InvalidInput, match=TOLD):
            Publisher(random_state_dict(path), [engine, engine], timeout_s=30)
        loop = asyncio.get_running_loop()
        with Publisher(random_state_dict(path), [engine], timeout_s=30) as publisher:
            await asyncio.to_thread(publisher.connect)
            with pytest.raises(StateError, match=TOLD):
                await asyncio.to_thread(publisher.add, AsyncEngineClient(engine, loop))
            assert (await asyncio.to_thread(publisher.publish)).ok
            await asyncio.to_thread(publisher.close)
    finally:
        await engine.shutdown()


class Named(LocalEngine):
    """Workers that others call under other names. An engine's calls come one after the other."""

    turn: threading.Lock

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        with self.turn:
            super().init(init_info, deadline)


@pytest.fixture
def workers() -> Iterator[Callable[[str], LocalEngine]]:
    """Engines that share two workers."""
    tensors = {"w": torch.randn(6, 5), "b": torch.randn(3)}
    first = LocalEngine("first", [DictModel(tensors, rows=(rank, 2)) for rank in range(2)])

    turn = threading.Lock()

    def named(name: str) -> LocalEngine:
        other = Named(name, [])
        other.models, other.workers, other.turn = first.models, first.workers, turn
        return other

    yield named
    first.stop()


def test_the_other_engines_go_on_without_it(workers: Callable[[str], LocalEngine]) -> None:
    weights = {"w": torch.randn(6, 5), "b": torch.randn(3)}
    with Publisher(weights, [workers("a"), workers("b")], require="live", timeout_s=10) as publisher:
        for number in (1, 2):
            weights["w"].copy_(torch.randn(6, 5))
            report = publisher.publish()
            assert report.number == number
            assert sorted(engine.ok for engine in report.engines) == [False, True]
            assert TOLD in str(next(engine.error for engine in report.engines if not engine.ok))


def test_a_dismissed_engine_may_come_back_under_another_name(workers: Callable[[str], LocalEngine]) -> None:
    weights = {"w": torch.randn(6, 5), "b": torch.randn(3)}
    with Publisher(weights, [workers("0")], timeout_s=10) as publisher:
        publisher.publish()
        for number in range(1, 6):
            publisher.remove(str(number - 1))
            publisher.add(workers(str(number)))
            weights["w"].copy_(torch.randn(6, 5))
            assert publisher.publish().engines[0].name == str(number)
        assert torch.equal(torch.cat([m.parameters()["w"] for m in workers("x").models]), weights["w"])


def test_clients_of_one_actor_are_one_engine() -> None:
    class Handle:
        """Handles of one Ray actor are equal, and not the same object."""

        __ray_call__ = staticmethod(print)

        def __init__(self, actor: str) -> None:
            self.actor = actor

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Handle) and other.actor == self.actor

        def __hash__(self) -> int:
            return hash(self.actor)

    weights = {"w": torch.randn(3)}
    with pytest.raises(InvalidInput, match=TOLD):
        Publisher(weights, [RayEngineClient(Handle("a")), RayEngineClient(Handle("a"))])
    Publisher(weights, [RayEngineClient(Handle("a")), RayEngineClient(Handle("b"))]).close()
