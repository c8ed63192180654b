"""Weights are replaced while requests are in flight, and every token says which version made it.

    python examples/rlhf_async.py [--engine embedded|vllm|sglang] [--steps 3]

One long request after another runs in an AsyncLLM, or in an ``sglang.Engine``. Meanwhile a policy learns from short ones and is published after each step:
the long ones are frozen for a moment and go on with the new weights.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from policy import NUM_TOKENS, PROMPTS, Learner, build, on_a_cpu

from weightcast import Publisher

NUM_LONG = 3
LONG_TOKENS = 400


class Engine:
    """An AsyncLLM of either kind; both take the same calls."""

    def __init__(self, kind: str, folder: Path) -> None:
        if kind == "vllm":
            from vllm.v1.engine.async_llm import AsyncLLM

            from vllm import AsyncEngineArgs, SamplingParams

            self.llm: Any = AsyncLLM.from_engine_args(
                AsyncEngineArgs(
                    str(folder),
                    dtype="float32",
                    enforce_eager=True,
                    max_model_len=1024,
                    kv_cache_memory_bytes=256 << 20,
                    weight_transfer_config={"backend": "weightcast"},
                )
            )
        else:
            from weightcast.engines.embedded import AsyncLLM, SamplingParams

            self.llm = AsyncLLM(folder)
        self._params = SamplingParams
        self._numbers = itertools.count()

    async def sample(self, prompt: list[int], max_tokens: int) -> Any:
        """The finished output for one prompt: its tokens, and spans of them with their versions."""
        params = self._params(max_tokens=max_tokens, temperature=1.0, ignore_eos=True)
        stream = self.llm.generate({"prompt_token_ids": prompt}, params, f"request-{next(self._numbers)}")
        return [output async for output in stream][-1].outputs[0]

    async def close(self) -> None:
        closing = self.llm.shutdown()
        if closing is not None:
            await closing


class SglangEngine:
    """The same with an ``sglang.Engine``, whose calls are others. It runs on the event loop that it is made on."""

    def __init__(self, folder: Path) -> None:
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        import sglang

        self.llm: Any = sglang.Engine(**on_a_cpu(str(folder), context_length=1024))

    async def sample(self, prompt: list[int], max_tokens: int) -> Any:
        """The finished output for one prompt: its tokens, and spans of them with their versions."""
        params = {"max_new_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True}
        answer = await self.llm.async_generate(input_ids=prompt, sampling_params=params)
        meta = answer["meta_info"]
        whole = [{"version": meta["weight_version"], "start": 0, "end": len(answer["output_ids"])}]
        spans = [SimpleNamespace(**span) for span in meta.get("weight_versions") or whole]
        return SimpleNamespace(token_ids=answer["output_ids"], weight_versions=spans)

    async def close(self) -> None:
        self.llm.shutdown()


async def talk(engine: Engine | SglangEngine, prompt: list[int], over: asyncio.Event) -> list[Any]:
    """Long answers, one after another, until the training is over."""
    answers = []
    while not over.is_set():
        answers.append(await engine.sample(prompt, LONG_TOKENS))
    return answers


async def train(engine: Engine | SglangEngine, folder: Path, steps: int) -> list[str]:
    """Learn from short answers and publish after each step; the versions in their order."""
    learner = Learner(folder)
    # Made on the loop that the engine runs on; it blocks, so it publishes from another thread.
    publisher = Publisher(learner.model, [engine.llm], pause="keep")
    versions = []
    for step in range(steps + 1):
        report = await asyncio.to_thread(publisher.publish)
        assert report.digests_match, report
        versions.append(report.version)
        answers = await asyncio.gather(*(engine.sample(prompt, NUM_TOKENS) for prompt in PROMPTS))
        gained = learner.step(PROMPTS, [list(answer.token_ids) for answer in answers])
        print(f"step {step}: reward {gained:.2f}, served by {report.version} after {report.total_s * 1e3:.0f} ms")
    await asyncio.to_thread(publisher.close)
    return versions


async def run(kind: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch))
        engine, over = SglangEngine(folder) if kind == "sglang" else Engine(kind, folder), asyncio.Event()
        try:
            talks = [asyncio.create_task(talk(engine, PROMPTS[number], over)) for number in range(NUM_LONG)]
            versions = ["default", *await train(engine, folder, steps)]
            over.set()
            answers = [answer for part in await asyncio.gather(*talks) for answer in part]
        finally:
            await engine.close()
    for number, answer in enumerate(answers):
        print(f"answer {number}: " + ", ".join(f"[{s.start}:{s.end}] {s.version}" for s in answer.weight_versions))
        served = [span.version for span in answer.weight_versions]
        assert served == sorted(served, key=versions.index), "versions only go up"
        assert [span.start for span in answer.weight_versions] == [0, *(s.end for s in answer.weight_versions[:-1])]
        assert answer.weight_versions[-1].end == len(answer.token_ids) == LONG_TOKENS
    assert any(len(answer.weight_versions) > 1 for answer in answers), (
        "no version changed while a request was in flight"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("embedded", "vllm", "sglang"), default="embedded")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    asyncio.run(run(options.engine, options.steps))


if __name__ == "__main__":
    main()
