"""The embedded engine on a GPU, fed by a transformers model of the trainer: its tokens equal those of a fresh load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_llm import NUM_TOKENS, PROMPTS, PipedLlm

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint

pytest.importorskip("triton", reason="needs a CUDA build of torch")

DEVICE, PULL, PUSH = "cuda", "cuda_ipc", "nccl"


def trainer_model(folder: Path) -> Any:
    """A transformers model, whose experts are fused in another way than in checkpoints."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(DEVICE)


def next_step(model: Any, folder: Path, number: int) -> Path:
    """Fresh random weights at the same addresses, and the same on disk."""
    from weightcast.sources import checkpoint_tensors

    weights = random_state_dict(folder)
    with torch.no_grad():
        for name, tensor in checkpoint_tensors(model).items():
            if name in weights:
                tensor.copy_(weights[name])
    return save_checkpoint(folder.parent / f"step-{number}", weights, like=folder)


@pytest.mark.parametrize(
    ("arch", "transport", "mode"),
    [
        ("qwen3", "pull", "in_place"),
        ("qwen3_moe", "pull", "staged"),
        ("qwen3_tied", "push", "staged"),
        ("qwen3", "push", "in_place"),
    ],
)
def test_tokens_equal_a_fresh_load(tmp_path: Path, arch: str, transport: str, mode: str) -> None:
    folder = build_tiny_model(tmp_path / "m", arch, "float32")
    model = trainer_model(folder)
    name = PULL if transport == "pull" else PUSH
    with PipedLlm(folder, DEVICE) as llm, Publisher(model, [llm], transport=name, mode=mode, timeout_s=30) as publisher:
        before = llm.tokens()
        seen = []
        for number in range(2):
            step = next_step(model, folder, number)
            report = publisher.publish()
            assert report.digests_match
            assert report.engines[0].workers[0].transport == name
            assert llm.get_weight_version() == report.version
            seen.append((step, llm.tokens()))
        assert before != seen[0][1] != seen[1][1]
    for step, got in seen:
        with PipedLlm(step, DEVICE) as fresh:
            assert fresh.tokens() == got


def test_trainer_and_engine_in_one_process(tmp_path: Path) -> None:
    from weightcast.engines.embedded import LLM, SamplingParams

    folder = build_tiny_model(tmp_path / "m", "qwen3", "float32")
    model = trainer_model(folder)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)

    def tokens(llm: Any) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]

    with LLM(folder, device=DEVICE, num_threads=1) as llm, Publisher(model, [llm], timeout_s=30) as publisher:
        before = tokens(llm)
        step = next_step(model, folder, 0)
        report = publisher.publish()
        assert report.engines[0].workers[0].transport == PULL
        after = tokens(llm)
    assert before != after
    with LLM(step, device=DEVICE, num_threads=1) as fresh:
        assert tokens(fresh) == after
