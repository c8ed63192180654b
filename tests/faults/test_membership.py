"""Engines that die, return and join while others serve: real processes, a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tests.support.engine_process import SLICE_NBYTES, TOKEN, EngineProcess, values_of
from tests.trials.chaos.reference import Reference
from tests.trials.chaos.servers import Server

from weightcast import Publisher
from weightcast.errors import RoundFailed
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model

TIMEOUT_S = 20.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def test_connecting_again_brings_who_was_replaced_to_what_the_others_serve(stack: ExitStack) -> None:
    engines = [EngineProcess() for _ in range(2)]
    for engine in engines:
        stack.callback(engine.close)
    publisher = stack.enter_context(
        Publisher(values_of(4), [engine.url for engine in engines], token=TOKEN, timeout_s=TIMEOUT_S)
    )
    first = publisher.publish()
    engines[0].kill()
    successor = engines[0].successor()
    stack.callback(successor.close)
    publisher.connect()
    assert set(publisher.versions.values()) == {first.version}
    assert successor.call("state") == (first.version, False)
    assert successor.call("holds", 4)
    assert engines[1].call("num_syncs") == 1
    assert publisher.publish().number == 2


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_who_took_the_place_of_a_dead_engine_takes_part_in_the_very_next_round(stack: ExitStack, mode: str) -> None:
    engines = [EngineProcess(mode) for _ in range(2)]
    for engine in engines:
        stack.callback(engine.close)
    tensors = values_of(0)
    publisher = stack.enter_context(
        Publisher(
            tensors, [engine.url for engine in engines], token=TOKEN, timeout_s=TIMEOUT_S, bucket_nbytes=SLICE_NBYTES
        )
    )
    publisher.publish()
    engines[0].kill()
    successor = engines[0].successor()
    stack.callback(successor.close)
    tensors.update(values_of(1))
    report = publisher.publish()
    assert report.ok
    assert report.number == 2
    assert successor.call("holds", 1)
    assert engines[1].call("holds", 1)


def test_a_server_that_joins_serves_nothing_before_it_is_current(stack: ExitStack, tmp_path: Path) -> None:
    checkpoint = build_tiny_model(
        tmp_path / "model", "qwen3", "float64", 0, hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )
    reference = Reference(checkpoint, 0)
    joiner = Server(checkpoint, tmp_path, 0, "staged")
    stack.callback(joiner.close)
    joiner.start()
    other = EngineProcess(checkpoint=str(checkpoint))
    stack.callback(other.close)
    publisher = stack.enter_context(Publisher(reference.weights(7), [other.url], token=TOKEN, timeout_s=TIMEOUT_S))
    first = publisher.publish()
    end = time.monotonic() + 60
    while not joiner.is_up:
        assert time.monotonic() < end, joiner.tail()
        assert not joiner.is_dead, joiner.tail()
        time.sleep(0.1)
    assert httpx.get(f"{joiner.url}/health", timeout=5).status_code == 200
    ready = httpx.get(f"{joiner.url}/ready", timeout=5)
    assert ready.status_code == 503
    assert "waiting for the first weights" in ready.text
    ask = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 4}
    assert httpx.post(f"{joiner.url}/v1/completions", json=ask, timeout=10).status_code == 503
    commits = other.call("num_syncs")
    report = publisher.add(joiner.url)
    assert report is not None
    assert report.version == first.version
    assert other.call("num_syncs") == commits
    answer = httpx.get(f"{joiner.url}/ready", timeout=5)
    assert answer.status_code == 200
    assert answer.json()["weight_version"] == first.version
    version, checksums = joiner.checksums()
    assert version == first.version
    expected = reference.checksums(7)
    assert {name: checksums[name] for name in expected} == expected
    assert httpx.post(f"{joiner.url}/v1/completions", json=ask, timeout=10).status_code == 200


def test_a_fleet_of_mixed_kinds(stack: ExitStack) -> None:
    """Served and in this process, staged and in place, sharded and whole, through the loader and not: one version for all."""
    served = [EngineProcess("staged", num_workers=2), EngineProcess("in_place", loader=True)]
    for engine in served:
        stack.callback(engine.close)
    local = LocalEngine("here", [DictModel(values_of(0), relocatable=False)], mode="staged")
    stack.callback(local.stop)
    tensors = values_of(0)
    engines = [*(engine.url for engine in served), local]
    publisher = stack.enter_context(Publisher(tensors, engines, token=TOKEN, timeout_s=TIMEOUT_S))
    for seed in (1, 2, 3):
        tensors.update(values_of(seed))
        report = publisher.publish()
        assert report.ok
        assert report.digests_match
        assert report.mode == "mixed"
        assert {engine.kind for engine in report.engines} == {"http", "local"}
        assert all(engine.call("holds", seed) for engine in served)
        assert local.models[0].holds(values_of(seed))
    served[0].arm("transfer:end", "corrupt")
    with pytest.raises(RoundFailed) as caught:
        publisher.publish()
    assert set(caught.value.causes) == {served[0].url}
    assert set(caught.value.serving.values()) == {report.version}
    assert local.models[0].holds(values_of(3))


def test_the_next_trainer_knows_the_digest_so_it_can_bring_a_joiner_to_what_is_served(stack: ExitStack) -> None:
    engines = [LocalEngine(name, [DictModel(values_of(0))], mode="staged") for name in ("a", "b")]
    for engine in engines:
        stack.callback(engine.stop)
    tensors = values_of(5)
    with Publisher(tensors, [engines[0]], timeout_s=TIMEOUT_S) as before:
        first = before.publish()
    # The engine may not have heard yet that the first one left.
    after = stack.enter_context(Publisher(tensors, [engines[0]], timeout_s=TIMEOUT_S, takeover=True))
    after.connect()
    report = after.add(engines[1])
    assert report is not None
    assert report.version == first.version
    assert engines[1].models[0].holds(values_of(5))
