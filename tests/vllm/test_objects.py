"""Engine objects of the trainer's own process whose engines run in processes of their own, as vLLM has it by default."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.vllm import offline
from tests.vllm.offline import NUM_TOKENS, PROMPTS, FreshLoads
from tests.vllm.weights import replace

from weightcast import Publisher
from weightcast.testing.engine_suite import AFTERWARDS, NEVER_ENDING
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.trainer.clients import AsyncVllmClient

LONG = 200
_numbers = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = {"max_position_embeddings": NEVER_ENDING + 64}
    return build_tiny_model(tmp_path_factory.mktemp("objects") / "m", "qwen3", dtype="bfloat16", head_dim=32, **room)


def tokens_of(answers: list[tuple[list[int], list[float]]]) -> list[list[int]]:
    return [ids for ids, _ in answers]


def test_an_llm_in_processes_of_its_own(model: Path, fresh: FreshLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    weights = random_state_dict(model)
    with offline.engine(model) as llm, Publisher(weights, [llm], timeout_s=60) as publisher:
        for _ in range(2):
            replace(weights, model)
            report = publisher.publish()
            assert report.digests_match
            assert llm.get_weight_version() == report.version
            got = [offline.answers(llm, [ids])[0] for ids in PROMPTS]
            assert got == fresh.answers(model, weights, PROMPTS)


@asynccontextmanager
async def async_llm(path: Path) -> AsyncIterator[Any]:
    """An ``AsyncLLM`` with the weightcast backend."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        str(path),
        enforce_eager=True,
        max_model_len=NEVER_ENDING + 64,
        max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20,
        weight_transfer_config={"backend": "weightcast"},
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        yield llm
    finally:
        llm.shutdown()


async def answer(llm: Any, ids: list[int], num_tokens: int = NUM_TOKENS, seen: list[int] | None = None) -> Any:
    """The finished output for one prompt; ``seen`` has its tokens so far."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    last = None
    async for output in llm.generate({"prompt_token_ids": ids}, params, f"request-{next(_numbers)}"):
        last = output.outputs[0]
        if seen is not None:
            seen[:] = last.token_ids
    assert last is not None
    return last


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def ended(request: asyncio.Task[Any], pause: str, seen: list[int], before: list[int]) -> None:
    """A request goes on after the commit until the test ends the request, or ends with the version before."""
    assert seen[:1] == before[:1]
    if pause == "keep":
        wanted = len(seen) + AFTERWARDS
        await until(lambda: len(seen) >= wanted)
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
        return
    output = await asyncio.wait_for(request, 60)
    tokens = list(output.token_ids)
    assert output.finish_reason == ("abort" if pause == "abort" else "length")
    assert tokens[:LONG] == before[: len(tokens)]
    assert len(tokens) == LONG or pause == "abort"


async def test_an_async_llm(model: Path, fresh: FreshLoads) -> None:
    """Every mode of pausing; afterwards tokens are those of a fresh load."""
    weights = random_state_dict(model)
    async with async_llm(model) as llm:
        for pause in ("keep", "wait", "abort"):
            before = list((await answer(llm, PROMPTS[0], LONG)).token_ids)
            replace(weights, model)
            seen: list[int] = []
            client = AsyncVllmClient(llm, asyncio.get_running_loop())
            publisher = Publisher(weights, [client], pause=pause, timeout_s=60)
            await asyncio.to_thread(publisher.connect)
            num_tokens = LONG if pause == "wait" else NEVER_ENDING
            request = asyncio.create_task(answer(llm, PROMPTS[0], num_tokens, seen))
            await until(partial(bool, seen))
            report = await asyncio.to_thread(publisher.publish)
            await ended(request, pause, seen, before)
            await asyncio.to_thread(publisher.close)
            assert report.digests_match
            assert not await llm.is_paused()
            assert await llm.get_weight_version() == report.version
            got = [list((await answer(llm, ids)).token_ids) for ids in PROMPTS]
            assert got == tokens_of(fresh.answers(model, weights, PROMPTS))
