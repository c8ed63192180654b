"""Greedy tokens equal transformers' generate: architectures, batching, pieces of prompts, preemption."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine_reference import check_greedy, greedy, greedy_on, random_prompts

from weightcast.engines.embedded import LLM, SamplingParams

ARCHS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_tied": {},
    "qwen3_moe": {},
    "mistral": {"sliding_window": 9},
    "gemma2": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0, "sliding_window": 9},
    "gemma3": {"sliding_window": 9},
    "deepseek_v3": {},
}


def _check_all(
    llm: LLM, reference: Any, rng: random.Random, *, count: int = 8, num_tokens: int = 14, longest: int = 60
) -> None:
    prompts = random_prompts(rng, count, reference.config.vocab_size, longest)
    lengths = [rng.randint(1, num_tokens) for _ in prompts]
    outputs = llm.generate(prompts, [SamplingParams(temperature=0, max_tokens=length) for length in lengths])
    ties = 0
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        ties += check_greedy(reference, prompt, output.outputs[0].token_ids, length)
    assert ties <= 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_architectures(arch: str, dtype: str, build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build(arch, dtype, **ARCHS[arch])
    llm = start(folder, max_num_seqs=5, max_num_batched_tokens=40)
    _check_all(llm, reference, rng)


def test_softcap_and_window_matter(build: Any, rng: random.Random) -> None:
    """Otherwise the equality above would prove nothing about them."""
    folder, reference = build("gemma2", **ARCHS["gemma2"])
    prompts = random_prompts(rng, 6, reference.config.vocab_size)
    with_both = [greedy(reference, prompt, 12) for prompt in prompts]
    for layer in reference.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    without_cap = [greedy(reference, prompt, 12) for prompt in prompts]
    assert without_cap != with_both
    from transformers import AutoModelForCausalLM

    wide = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", sliding_window=4096)
    assert [greedy(wide, prompt, 12) for prompt in prompts] != with_both


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "deepseek_v3"])
def test_preemption_and_pieces(arch: str, build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build(arch, **ARCHS[arch])
    llm = start(folder, max_num_seqs=8, max_num_batched_tokens=11, max_model_len=150, kv_cache_tokens=300)
    prompts = [[rng.randrange(3, 300) for _ in range(rng.randint(30, 80))] for _ in range(9)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_on(reference, prompt, 30)
    assert llm.status().num_preemptions > 0
    assert llm.status().num_running == llm.status().num_waiting == 0


def test_a_model_object_is_copied(build: Any, start: Any, rng: random.Random) -> None:
    _, reference = build("llama")
    prompt = random_prompts(rng, 2, reference.config.vocab_size)[1]
    expected = greedy(reference, prompt, 10)
    llm = start(reference)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter))
    got = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].token_ids
    assert got == expected
    assert reference.config._attn_implementation == "eager"


def test_samples_of_one_prompt_share_its_keys(build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build("qwen3")
    prompt = random_prompts(rng, 2, reference.config.vocab_size, longest=50)[1]
    llm = start(folder, max_num_seqs=6, max_num_batched_tokens=16)
    computed = []
    runner = llm.engine.core._runner
    forward = runner.forward

    def counting(work: Any) -> Any:
        computed.append(sum(item.count for item in work))
        return forward(work)

    runner.forward = counting
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9, n=8))[0]
    expected = greedy(reference, prompt, 9)
    assert [each.token_ids for each in output.outputs] == [expected] * 8
    assert sum(computed) <= 2 * len(prompt) + 8 * 9


def test_prompt_shapes(build: Any, start: Any) -> None:
    folder, reference = build("qwen3")
    llm = start(folder)
    ids = llm.get_tokenizer().encode("one two")
    params = SamplingParams(temperature=0, max_tokens=6)
    shapes = ["one two", ids, {"prompt": "one two"}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(shape, params) for shape in shapes]
    outputs.append(llm.generate([ids, "one two"], params)[:1])
    expected = greedy(reference, ids, 6)
    assert all(len(output) == 1 and output[0].outputs[0].token_ids == expected for output in outputs)
    assert outputs[0][0].prompt == "one two"
    tokenizer = llm.get_tokenizer()
    chat = [{"role": "user", "content": "hello"}]
    encoded = tokenizer.encode(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    assert llm.chat(chat, params)[0].outputs[0].token_ids == greedy(reference, encoded, 6)
