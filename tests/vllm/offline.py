"""Engines inside the test's own process: three seconds each, no server."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weightcast.testing.models import save_checkpoint

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

PROMPTS = [[5, 17, 33, 2, 90], [44, 45, 46], list(range(60, 100)), [7]]
NUM_TOKENS = 12
MARK = "ANSWERS "


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` over a model folder, with the weightcast backend."""
    from vllm import LLM

    llm = LLM(
        model=str(path),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20,
        weight_transfer_config={"backend": "weightcast"},
        disable_log_stats=True,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answers(llm: Any, prompts: Sequence[list[int]] = PROMPTS) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of each prompt and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [
        (
            list(output.outputs[0].token_ids),
            [
                step[token].logprob
                for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
            ],
        )
        for output in outputs
    ]


def fresh_answers(
    model: Path, weights: Mapping[str, torch.Tensor], prompts: Sequence[list[int]]
) -> list[tuple[list[int], list[float]]]:
    """What vLLM answers, prompt by prompt, when it loads these weights from disk in a process of its own."""
    folder = save_checkpoint(model.parent / f"fresh-{time.monotonic_ns()}", weights, like=model)
    command = [sys.executable, "-m", "tests.vllm.offline", str(folder), json.dumps(list(prompts))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, done.stderr[-3000:]
    return [(ids, logprobs) for ids, logprobs in json.loads(lines[0].removeprefix(MARK))]


if __name__ == "__main__":
    with engine(Path(sys.argv[1])) as loaded:
        print(MARK + json.dumps([answers(loaded, [ids])[0] for ids in json.loads(sys.argv[2])]))
