"""Engine objects of the trainer's own process whose engines run in processes of their own, as vLLM has it by default."""

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.vllm import offline
from tests.vllm.offline import NUM_TOKENS, PROMPTS, FreshLoads
from tests.vllm.weights import replace

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.trainer.clients import AsyncVllmClient, CommitOrder, CommitReply

LONG = 200
_numbers = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("objects") / "m", "qwen3", dtype="bfloat16", head_dim=32)


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
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20,
        weight_transfer_config={"backend": "weightcast"},
    )
    llm = AsyncLLM.from_engine_args(arguments)
    try:
        yield llm
    finally:
        llm.shutdown()


async def answer(llm: Any, ids: list[int], num_tokens: int = NUM_TOKENS, begun: threading.Event | None = None) -> Any:
    """The finished output for one prompt; ``begun`` is set when its first tokens are there."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    last = None
    async for output in llm.generate({"prompt_token_ids": ids}, params, f"request-{next(_numbers)}"):
        last = output.outputs[0]
        if begun is not None:
            begun.set()
    assert last is not None
    return last


class OrderedMidway(AsyncVllmClient):
    """Orders a commit when a request has begun to answer with the version before."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(engine, loop)
        self._llm, self._loop = engine, loop
        self.request: concurrent.futures.Future[Any] | None = None

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.request is None:
            begun = threading.Event()
            self.request = asyncio.run_coroutine_threadsafe(answer(self._llm, PROMPTS[0], LONG, begun), self._loop)
            assert begun.wait(deadline.remaining_s()), "no tokens"
        return super().commit(order, deadline)


async def test_an_async_llm(model: Path, fresh: FreshLoads) -> None:
    """Every mode of pausing; afterwards tokens are those of a fresh load."""
    weights = random_state_dict(model)
    async with async_llm(model) as llm:
        for pause in ("keep", "wait", "abort"):
            before = list((await answer(llm, PROMPTS[0], LONG)).token_ids)
            replace(weights, model)
            client = OrderedMidway(llm, asyncio.get_running_loop())
            publisher = Publisher(weights, [client], pause=pause, timeout_s=60)
            report = await asyncio.to_thread(publisher.publish)
            assert client.request is not None
            output = await asyncio.wait_for(asyncio.wrap_future(client.request), 60)
            await asyncio.to_thread(publisher.close)
            assert report.digests_match
            assert not await llm.is_paused()
            assert await llm.get_weight_version() == report.version
            tokens = list(output.token_ids)
            assert output.finish_reason == ("abort" if pause == "abort" else "length")
            assert tokens[:1] == before[:1]
            if pause == "keep":
                assert tokens != before
            else:
                assert tokens == before[: len(tokens)]
            assert len(tokens) == LONG or pause == "abort"
            got = [list((await answer(llm, ids)).token_ids) for ids in PROMPTS]
            assert got == tokens_of(fresh.answers(model, weights, PROMPTS))
