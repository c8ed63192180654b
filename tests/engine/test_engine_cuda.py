"""The engine on a CUDA device."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from weightcast.engines.embedded import SamplingParams
from weightcast.testing.models import build_tiny_model

DEVICE = "cuda"
TIE = 1e-4
"""The gap between the two best logits, as a part of the largest, below which rounding in float32 may choose either."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def _is_tie(model: Any, prompt: list[int], expected: list[int], got: list[int]) -> bool:
    """False where the tokens are equal; True where they first differ by a choice between two logits that are as good as equal.
    Anything else is an AssertionError."""
    if got == expected:
        return False
    assert len(got) == len(expected), f"{len(got)} tokens instead of {len(expected)}"
    at = next(i for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)) if ours != theirs)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[:at]], device=model.device)).logits[0, -1]
    best = torch.topk(logits, 2)
    gap = float(best.values[0] - best.values[1]) / float(logits.abs().max())
    assert gap < TIE, f"token {at}: {got[at]} instead of {expected[at]}, which leads by {gap:.2e} of the largest logit"
    assert got[at] in best.indices.tolist(), f"token {at}: {got[at]} is not among the two best, {best.indices.tolist()}"
    return True


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2", "deepseek_v3"])
def test_greedy_equals_generate(arch: str, tmp_path: Path, start: Any, rng: random.Random) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "m", arch, "float64", seed=rng.getrandbits(31))
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float64", attn_implementation="eager", experts_implementation="eager"
    )
    reference = reference.to("cuda").eval()
    llm = start(folder, max_num_seqs=6, max_num_batched_tokens=40, max_model_len=150, kv_cache_tokens=400)
    prompts = [[rng.randrange(3, 300) for _ in range(rng.randint(1, 80))] for _ in range(9)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == _greedy(reference, prompt, 50)


@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_float32_greedy_equals_generate_but_for_ties(arch: str, tmp_path: Path, start: Any, rng: random.Random) -> None:
    """What users run is float32 or less: matrix products of other kernels, with other rounding, and the same tokens."""
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "m", arch, "float32", seed=rng.getrandbits(31))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(DEVICE).eval()
    llm = start(folder, device=DEVICE, max_num_seqs=6, max_num_batched_tokens=64, max_model_len=160)
    assert llm.engine.model.dtype == reference.dtype == torch.float32
    lengths = [1, 2, 70, *(rng.randint(3, 100) for _ in range(7))]
    prompts = [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]
    wanted = [rng.randint(32, 56) for _ in prompts]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in wanted]
    ties = 0
    for prompt, count, output in zip(prompts, wanted, llm.generate(prompts, params), strict=True):
        assert output.prompt_token_ids == prompt
        ties += _is_tie(reference, prompt, _greedy(reference, prompt, count), output.outputs[0].token_ids)
    assert ties <= len(prompts) // 4, f"{ties} of {len(prompts)} prompts differ"


def test_seeded_samples_equal_those_of_the_cpu(tmp_path: Path, start: Any, rng: random.Random) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3", "float64", seed=rng.getrandbits(31))
    params = SamplingParams(
        seed=rng.getrandbits(40), temperature=0.9, top_p=0.9, top_k=50, max_tokens=30, n=3, logprobs=2
    )
    prompts = [[rng.randrange(3, 300) for _ in range(length)] for length in (1, 17, 60)]
    on_cpu = start(folder, device="cpu").generate(prompts, params)
    on_gpu = start(folder, device="cuda").generate(prompts, copy.copy(params))
    for left, right in zip(on_cpu, on_gpu, strict=True):
        assert [each.token_ids for each in left.outputs] == [each.token_ids for each in right.outputs]
        assert left.outputs[0].cumulative_logprob == pytest.approx(right.outputs[0].cumulative_logprob, abs=1e-5)


def test_running_out_of_memory_is_survived(tmp_path: Path, start: Any) -> None:
    llm = start(build_tiny_model(tmp_path / "m", "qwen3"), device="cuda")

    def hoard(*_: Any) -> None:
        handle.remove()
        torch.empty(2**45, dtype=torch.uint8, device="cuda")

    handle = llm.engine.model.model.layers[0].register_forward_pre_hook(hoard)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with pytest.raises(Exception, match="OutOfMemoryError"):
        llm.generate([[1, 2, 3]], params)
    assert len(llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids) == 5
