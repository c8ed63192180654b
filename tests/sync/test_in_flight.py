"""Requests in flight over a publish: `pause` and `clear_cache` mean the same for an LLM object, an AsyncLLM object and a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.commit_ways import Loop, serving

from weightcast import Publisher
from weightcast.engines.base import CompletionOutput, RequestOutput, SamplingParams
from weightcast.engines.embedded import LLM, AsyncLLM
from weightcast.engines.embedded.engine import Engine
from weightcast.server import ServerConfig, create_app
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint
from weightcast.trainer.clients import AsyncEngineClient, EngineClient, HttpEngineClient, InProcessEngineClient

PROMPT = [5, 6, 7, 8]
LENGTH = 200


@contextmanager
def object_of(path: Path) -> Iterator[tuple[Engine, EngineClient]]:
    llm = LLM(path, dtype="float32")
    yield llm.engine, InProcessEngineClient(llm)
    llm.shutdown()


@contextmanager
def async_object_of(path: Path) -> Iterator[tuple[Engine, EngineClient]]:
    loop, llm = Loop(), AsyncLLM(path, dtype="float32")
    yield llm.engine, AsyncEngineClient(llm, loop.loop)
    llm.engine.shutdown()
    loop.close()


@contextmanager
def server_of(path: Path) -> Iterator[tuple[Engine, EngineClient]]:
    llm = AsyncLLM(path, dtype="float32")
    with serving(create_app(llm, ServerConfig())) as url:
        yield llm.engine, HttpEngineClient(url)
    llm.engine.shutdown()


class Request:
    """A long request of an engine, and its latest output."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.last: RequestOutput | None = None
        self._ended = threading.Event()
        params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
        engine.submit([engine.request(PROMPT, params, self._take, stream=True)]).result(10)

    def _take(self, output: RequestOutput) -> None:
        self.last = output
        time.sleep(0.002)  # on the engine's thread: the request is in flight for as long as a publish takes
        if output.finished:
            self._ended.set()

    def started(self) -> None:
        while self.last is None or len(self.last.outputs[0].token_ids) < 5:
            time.sleep(0.001)

    def output(self) -> CompletionOutput:
        assert self._ended.wait(60)
        assert self.last is not None
        return self.last.outputs[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "m", "qwen3")


@pytest.mark.parametrize("way", [object_of, async_object_of, server_of])
@pytest.mark.parametrize("pause", ["keep", "none", "wait", "abort"])
def test_a_request_in_flight(way: Any, pause: Any, path: Path, tmp_path: Path) -> None:
    weights = random_state_dict(path)
    with way(path) as (engine, client), Publisher(weights, [client], timeout_s=60, pause=pause) as publisher:
        first = publisher.publish()
        request = Request(engine)
        request.started()
        weights.update(random_state_dict(path))
        second = publisher.publish()
        assert second.digests_match
        assert not engine.paused
        output = request.output()
        versions = [span.version for span in output.weight_versions]
        if pause == "abort":
            assert (output.finish_reason, versions) == ("abort", [first.version])
        elif pause == "wait":
            assert (output.finish_reason, versions) == ("length", [first.version])
        else:
            assert versions == [first.version, second.version]
            assert_recomputed(output, save_checkpoint(tmp_path / "new", weights, path))


def assert_recomputed(output: CompletionOutput, checkpoint: Path) -> None:
    """What came after the commit is what a fresh load of the new weights makes of what came before."""
    at = output.weight_versions[0].end
    fresh = LLM(checkpoint, dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH - at, ignore_eos=True)
    (expected,) = fresh.generate([PROMPT + output.token_ids[:at]], params)
    fresh.shutdown()
    assert output.token_ids[at:] == list(expected.outputs[0].token_ids)


def test_a_pause_for_an_update_of_an_object_is_undone_when_it_takes_too_long(path: Path) -> None:
    weights = random_state_dict(path)
    with object_of(path) as (engine, client), Publisher(weights, [client], timeout_s=60, pause="wait") as publisher:
        first = publisher.publish()
        request = Request(engine)
        request.started()
        with pytest.raises(Exception, match="longer"):
            publisher.publish(timeout_s=0.1)
        assert request.output().finish_reason == "length"
        while engine.paused:
            time.sleep(0.01)
        assert engine.weight_version == first.version
        assert publisher.publish().digests_match
