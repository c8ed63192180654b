"""What transformers answers with the same weights: greedy tokens of a fresh load."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from weightcast.testing.models import random_state_dict, save_checkpoint

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]
NEAR = 1e-3
"""Logits of other float32 kernels differ by less. Those of a tiny random model have a standard deviation of about 3."""


class Reference:
    """A model of transformers that was loaded from a checkpoint of these weights."""

    def __init__(self, model: Path, weights: Mapping[str, torch.Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        self.checkpoint = save_checkpoint(model.parent / f"fresh-{time.monotonic_ns()}", weights, like=model)
        self._model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    def answer(self, ids: list[int], num_tokens: int = 12) -> list[int]:
        """Return the greedy tokens after these."""
        with torch.no_grad():
            out = self._model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return [int(token) for token in out[0, len(ids) :]]

    def answers(self) -> list[list[int]]:
        """Return the greedy tokens after each of ``PROMPTS``."""
        return [self.answer(ids) for ids in PROMPTS]

    def follows(self, ids: list[int], start: int, near: float = NEAR) -> list[bool]:
        """Say for each token from ``start`` on whether no other token has a logit that is higher by ``near``."""
        with torch.no_grad():
            logits = self._model(torch.tensor([ids])).logits[0, start - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        return [bool(near) for near in chosen >= logits.max(-1).values - near]


def replace(weights: dict[str, torch.Tensor], model: Path) -> None:
    """Give all tensors fresh random values, in place."""
    with torch.no_grad():
        for name, value in random_state_dict(model).items():
            weights[name].copy_(value)
