"""Engines on an event loop: a Publisher beside the loop, and what it says on it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightcast import Publisher
from weightcast.commit.engines import AsyncEnginePort
from weightcast.engines.base import SamplingParams
from weightcast.engines.embedded import AsyncLLM
from weightcast.errors import InvalidInput, StateError, WeightcastError
from weightcast.report.model import Report
from weightcast.sources.holder import GivenUp
from weightcast.testing.models import build_tiny_model, random_state_dict


async def test_rounds_beside_the_loop(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    engine = AsyncLLM(path)
    try:
        weights = random_state_dict(path)
        with Publisher(weights, [engine], timeout_s=20) as publisher:
            first = await asyncio.to_thread(publisher.publish)
            stream = engine.generate([5, 6, 7], SamplingParams(max_tokens=400, ignore_eos=True))
            await anext(stream)
            for name, value in random_state_dict(path).items():
                weights[name].copy_(value)
            second = await asyncio.to_thread(publisher.publish)
            last = [output async for output in stream][-1].outputs[0]
            assert second.digests_match
            assert [span.version for span in last.weight_versions] == [first.version, second.version]
            assert last.finish_reason == "length"
            assert not await engine.is_paused()
            await asyncio.to_thread(publisher.close)
    finally:
        await engine.shutdown()


async def test_a_publisher_that_blocks_the_loop_says_so(tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    engine = AsyncLLM(path)
    try:
        with Publisher(random_state_dict(path), [engine], timeout_s=60) as publisher:
            for call in (publisher.connect, publisher.publish):
                with pytest.raises(StateError, match="to_thread"):
                    call()
            report = await asyncio.to_thread(publisher.publish)
            assert await engine.get_weight_version() == report.version
    finally:
        await engine.shutdown()


async def test_a_round_beside_the_loop_is_not_waited_for_on_it(tmp_path: Path) -> None:
    """The round needs the loop for its commit: whoever waited for it there would wait until its deadline."""
    path = build_tiny_model(tmp_path / "m", "qwen3")
    engine = AsyncLLM(path)
    weights = random_state_dict(path)
    try:
        with Publisher(weights, [engine], timeout_s=30) as publisher:
            await asyncio.to_thread(publisher.publish)
            for name, value in random_state_dict(path).items():
                weights[name].copy_(value)
            publishing = publisher.publish(wait=False)
            calls: list[Callable[[], object]] = [publishing.wait, publisher.connect, publisher.publish]
            for call in [*calls, lambda: publisher.publish(wait=False)]:
                with pytest.raises(
                    StateError, match=r"needs the event loop.*await asyncio\.to_thread\(publishing\.wait"
                ):
                    call()
            report = await asyncio.to_thread(publishing.wait)
            assert (report.number, report.digests_match) == (2, True)
            assert publishing.wait() is report
            assert await engine.get_weight_version() == report.version
            await asyncio.to_thread(publisher.publish)
    finally:
        await engine.shutdown()


@pytest.mark.parametrize("beside", [True, False])
async def test_a_publisher_that_is_closed_on_the_loop_closes_behind_its_round(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    engine = AsyncLLM(path)
    commits, pause = asyncio.Event(), AsyncEnginePort.pause

    async def told(*given: Any) -> None:
        commits.set()
        await pause(*given)

    weights = random_state_dict(path)
    try:
        publisher = Publisher(weights, [engine], timeout_s=30)
        first = await asyncio.to_thread(publisher.publish)
        for name, value in random_state_dict(path).items():
            weights[name].copy_(value)
        monkeypatch.setattr(AsyncEnginePort, "pause", told)
        publishing = publisher.publish(wait=False) if beside else None
        round = asyncio.ensure_future(asyncio.to_thread(publisher.publish if publishing is None else publishing.wait))
        await commits.wait()  # and the commit stands still while this does not wait
        publisher.close()
        with pytest.raises(StateError, match="the publisher is closed"):
            publisher.publish()
        (outcome,) = await asyncio.gather(round, return_exceptions=True)
        if isinstance(outcome, Report):
            version = outcome.version
        else:  # a call is called off, and its round is taken back
            assert isinstance(outcome, WeightcastError)
            assert (beside, outcome.hint) == (False, "Make a new Publisher")
            version = first.version
        assert await engine.get_weight_version() == version
        assert not await engine.is_paused()
        control = publisher._part._coordinator._pump._thread  # type: ignore[union-attr]
        await asyncio.to_thread(control.join)  # it is freed, by whoever was the last
        async with asyncio.timeout(30):
            while not isinstance(publisher._holder.source, GivenUp):
                await asyncio.sleep(0.01)
        with Publisher(weights, [engine], timeout_s=30, takeover=True) as successor:
            assert (await asyncio.to_thread(successor.publish)).digests_match
            await asyncio.to_thread(successor.close)
    finally:
        await engine.shutdown()


def test_an_asynchronous_engine_needs_its_loop(tmp_path: Path) -> None:
    engine = AsyncLLM(build_tiny_model(tmp_path / "m", "qwen3"))
    try:
        with pytest.raises(InvalidInput, match="event loop"):
            Publisher(random_state_dict(tmp_path / "m"), [engine])
    finally:
        asyncio.run(engine.shutdown())
