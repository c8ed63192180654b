"""LoRA adapters of a trainer on engine objects whose engines run in processes of their own, and on several workers."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.vllm import offline
from tests.vllm.adapters import LORA, PROMPTS, asked, base_tokens, greedy, params, scatter, tokens_of, trainer_of
from tests.vllm.test_parallel import PATIENT

from weightcast import Publisher
from weightcast.errors import EngineError, RoundFailed, UnknownModel
from weightcast.testing.models import build_tiny_model
from weightcast.testing.vllm_server import vllm_server

FAULTY = Path(__file__).parent / "faulty"
LONG = 400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("objects") / "m", "qwen3", dtype="float32", head_dim=32)


def test_an_llm_in_processes_of_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    trainer = trainer_of(model)
    with offline.engine(model, **LORA) as llm, Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        labels = []
        for _ in range(3):
            scatter(trainer)
            labels.append(f"policy@{publisher.publish().version}")
            assert tokens_of(llm, PROMPTS[0]) == greedy(trainer, PROMPTS[0])
            assert tokens_of(llm, PROMPTS[1], None) == base_tokens(trainer, PROMPTS[1])
        with pytest.raises(UnknownModel, match="retired"):
            tokens_of(llm, PROMPTS[0], labels[0])
        assert tokens_of(llm, PROMPTS[0], labels[2]) == greedy(trainer, PROMPTS[0])


@asynccontextmanager
async def async_llm(path: Path) -> AsyncIterator[Any]:
    """An ``AsyncLLM`` with LoRA and the weightcast backend."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    usual = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20}
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(str(path), weight_transfer_config={"backend": "weightcast"}, **usual, **LORA)
    )
    try:
        yield llm
    finally:
        llm.shutdown()


async def answer(llm: Any, name: str, prompt: Any, length: int, begun: threading.Event | None = None) -> Any:
    last = None
    async for output in llm.generate(prompt, params(length), name, lora_request=asked("policy")):
        last = output
        if begun is not None:
            begun.set()
    assert last is not None
    return last


@pytest.mark.asyncio
async def test_an_async_llm_computes_on_while_versions_change(model: Path) -> None:
    trainer = trainer_of(model)
    async with async_llm(model) as llm:
        publisher = Publisher(trainer, [llm], adapter="policy", timeout_s=60)
        with pytest.raises(Exception) as early:
            await answer(llm, "early", {"prompt_token_ids": PROMPTS[0]}, 4)
        assert isinstance(early.value.__cause__ or early.value, UnknownModel)
        first = (await asyncio.to_thread(publisher.publish)).version
        truth, begun = greedy(trainer, PROMPTS[0], LONG), threading.Event()
        running = asyncio.create_task(answer(llm, "old", {"prompt_token_ids": PROMPTS[0]}, LONG, begun))
        await asyncio.to_thread(begun.wait, 120)
        await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        assert not running.done(), (
            "the pause is the test's: the request is in flight, and an adapter's commit leaves it so"
        )
        scatter(trainer)
        second = (await asyncio.to_thread(publisher.publish)).version
        assert await llm.is_paused()
        others = [
            asyncio.create_task(answer(llm, name, asked_for, 24))
            for name, asked_for in (("new", {"prompt_token_ids": PROMPTS[1]}), ("text", "hello there"))
        ]
        await asyncio.sleep(0)
        await llm.engine_core.resume_scheduler_async()
        old, new, text = await asyncio.gather(running, *others)
        assert (old.lora_request.lora_name, list(old.outputs[0].token_ids)) == (f"policy@{first}", truth)
        assert new.lora_request.lora_name == f"policy@{second}"
        assert list(new.outputs[0].token_ids) == greedy(trainer, PROMPTS[1])
        assert list(text.outputs[0].token_ids) == greedy(trainer, text.prompt_token_ids)
        await asyncio.to_thread(publisher.close)


def test_a_worker_that_fails_takes_the_round_back_on_all(model: Path) -> None:
    """Tensor parallelism: each worker has its part of the matrices, and a round that one cannot commit is none's."""
    faults, trainer = model.parent / "faults", trainer_of(model, "tuned")
    faults.mkdir()
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")]),
        "WEIGHTCAST_FAULTY_FOLDER": str(faults),
    }
    options = ("--tensor-parallel-size", "2", "--enable-lora", "--max-loras", "3", "--dtype", "float32")
    with (
        vllm_server(model, *options, env=env) as served,
        Publisher(trainer, [served.url], token=served.token, adapter="tuned", **PATIENT) as publisher,
    ):

        def asked_for() -> tuple[str, list[int]]:
            body = {"model": "tuned", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            answer = served.post("/v1/completions", {**body, "return_token_ids": True}).json()
            return answer["model"], answer["choices"][0]["token_ids"]

        for rank in (None, 1, 0):
            report = publisher.publish()
            assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
            before = (f"tuned@{report.version}", greedy(trainer, PROMPTS[0]))
            assert asked_for() == before
            if rank is not None:
                (faults / f"adapter-{rank}").touch()
            scatter(trainer)
            if rank is not None:
                with pytest.raises((RoundFailed, EngineError), match="the worker stumbled"):
                    publisher.publish()
                assert asked_for() == before
