"""What transformers itself makes of a prompt, and the comparison with it."""

from __future__ import annotations

import random
from typing import Any

import torch


def random_prompts(rng: random.Random, count: int, vocab: int, longest: int = 60) -> list[list[int]]:
    """Prompts of uneven lengths, among them one of a single token."""
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What ``model.generate`` continues a prompt with."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def greedy_on(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """The same, going on through the end-of-text token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def check_greedy(model: Any, prompt: list[int], got: list[int], num_tokens: int) -> int:
    """Assert equality with ``generate``; in float32 the first difference may be a tie. Returns the number of ties."""
    expected = greedy(model, prompt, num_tokens)
    if got == expected:
        return 0
    assert model.dtype == torch.float32, f"{got} != {expected}"
    at = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
    assert at is not None, f"{got} != {expected}"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    gap = float(logits[expected[at]] - logits[got[at]])
    assert abs(gap) < 1e-4 * float(logits.abs().max()), f"token {at}: {got[at]} is {gap} behind {expected[at]}"
    return 1
