"""The task, the policy's folder and the model's log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weightcast_demo import task
from weightcast_demo.policy import answer_logprobs, build_policy, policy_config, save_folder


def test_alphabet_of_fifteen_different_characters() -> None:
    assert len(task.ALPHABET) == len(set(task.ALPHABET)) == 15
    text = "^83512907=01235789._"
    assert task.decode(task.encode(text)) == text
    assert task.encode("aé") == [task.UNKNOWN] * 2


def test_prompts_repeat_by_seed_and_differ_between_seeds() -> None:
    one, same, other = (task.SortingDigits(seed) for seed in (41, 41, 42))
    first = one.prompts(50)
    assert torch.equal(first, same.prompts(50))
    assert not torch.equal(first, one.prompts(50))
    assert not torch.equal(first, other.prompts(50))


def test_answers_are_sorted_and_earn_the_reward() -> None:
    prompts = task.SortingDigits(43).prompts(100)
    for prompt, answer in zip(prompts.tolist(), task.answers(prompts).tolist(), strict=True):
        text = task.decode(prompt)
        assert task.decode(answer) == "".join(sorted(text[1:9])) + "."
        assert task.reward(prompt, answer) == 1.0


@pytest.mark.parametrize("answer", ["01235789", "01235798.", "01235789..", "", "0123578.9", "^83512907=01235789."])
def test_anything_else_earns_nothing(answer: str) -> None:
    assert task.reward(task.encode("^83512907="), task.encode(answer)) == 0.0


def test_served_tokenizer_knows_the_alphabet(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    save_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = task.SortingDigits(44).prompts(1)[0].tolist()
    text = task.decode(prompt)
    assert tokenizer(text, add_special_tokens=False).input_ids == prompt
    assert tokenizer.decode(prompt) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (task.END, task.PAD)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == (
        policy_config().to_dict() | {"_name_or_path": ""}
    )
    assert not list(tmp_path.glob("*.safetensors")), "a server that starts from it waits for weights"


def test_policy_repeats_by_seed_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    one, same, other = (build_policy(seed) for seed in (45, 45, 46))
    assert torch.equal(before, torch.get_rng_state())
    assert 600_000 < sum(parameter.numel() for parameter in one.parameters()) < 700_000
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@torch.no_grad()
def test_answer_logprobs_equal_those_of_one_token_after_another() -> None:
    model = build_policy(47).double()
    generator = torch.Generator().manual_seed(47)
    prompts = task.SortingDigits(47).prompts(3)
    tokens = torch.randint(0, 15, (3, 5), generator=generator)
    together = answer_logprobs(model, prompts, tokens)
    for row in range(3):
        text = prompts[row].tolist()
        for place, token in enumerate(tokens[row].tolist()):
            alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].float().log_softmax(-1)
            assert together[row, place].item() == pytest.approx(alone[token].item(), abs=1e-6)
            text.append(token)
