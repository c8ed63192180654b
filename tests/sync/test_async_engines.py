"""Engines on an event loop: a Publisher beside the loop, and what it says on it."""

import asyncio
from pathlib import Path

import pytest

from weightcast import Publisher
from weightcast.engines.base import SamplingParams
from weightcast.engines.embedded import AsyncLLM
from weightcast.errors import InvalidInput, StateError
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


def test_an_asynchronous_engine_needs_its_loop(tmp_path: Path) -> None:
    engine = AsyncLLM(build_tiny_model(tmp_path / "m", "qwen3"))
    try:
        with pytest.raises(InvalidInput, match="event loop"):
            Publisher(random_state_dict(tmp_path / "m"), [engine])
    finally:
        asyncio.run(engine.shutdown())
