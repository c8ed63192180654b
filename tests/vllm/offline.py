"""Engines inside the test's own process: a fraction of a second each once the first one has started, no server."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
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
_RUNNING: list[Path] = []
_freeze = gc.freeze


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` over a model folder, with the weightcast backend."""
    from vllm import LLM

    _quick_starts()
    usual = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    backend = {"backend": "weightcast"}
    llm = LLM(model=str(path), weight_transfer_config=backend, **{**usual, **options})
    _RUNNING.append(path)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        _RUNNING.remove(path)
        if not _RUNNING:
            _freeze()


@cache
def _quick_starts() -> None:
    """Spare engines of this process what has nothing to do with the model, nine tenths of a start.

    vLLM collects garbage eight times an engine, each time among two million objects that were imported: these are frozen for good, and all
    that is left when no engine runs. A CPU's stand-ins for Triton's kernels are put in place once, and not around each other. What vLLM
    asks of a model's class is asked in here, not in a process that imports vLLM anew.
    """
    import vllm.v1.engine.core  # noqa: F401 - imports what an engine needs
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    gc.collect()
    _freeze()
    gc.freeze = gc.unfreeze = _nothing
    registry._run_in_subprocess = _here
    platform = type(current_platform)
    if hasattr(platform, "register_triton_kernel_overrides"):
        platform.register_triton_kernel_overrides = staticmethod(cache(platform.register_triton_kernel_overrides))


def _nothing() -> None: ...


def _here(function: Callable[[], Any]) -> Any:
    return function()


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


class FreshLoads:
    """A process that loads checkpoints with vLLM one after another: what it answers is what a fresh server would."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def answers(
        self, model: Path, weights: Mapping[str, torch.Tensor], prompts: Sequence[list[int]], **options: Any
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and log-probabilities, prompt by prompt, of these weights with the config of the folder ``model``."""
        folder = save_checkpoint(model.parent / f"fresh-{time.monotonic_ns()}", weights, like=model)
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(folder), list(prompts), options]) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(MARK):
                return [(ids, logprobs) for ids, logprobs in json.loads(line.removeprefix(MARK))]
        raise AssertionError(f"the process of fresh loads ended with {process.wait()}")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    @staticmethod
    def _started() -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.vllm.offline"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    for line in sys.stdin:
        folder, prompts, options = json.loads(line)
        with engine(Path(folder), **options) as loaded:
            print(MARK + json.dumps([answers(loaded, [ids])[0] for ids in prompts]), flush=True)


if __name__ == "__main__":
    main()
