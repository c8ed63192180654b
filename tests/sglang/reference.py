"""What transformers answers with the same weights: greedy tokens of a fresh load."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from weightcast.testing.models import random_state_dict, save_checkpoint

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]


class Reference:
    """A model of transformers that was loaded from a checkpoint of these weights."""

    def __init__(self, model: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.checkpoint = save_checkpoint(model.parent / f"fresh-{time.monotonic_ns()}", weights, like=model)
        self._model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    def answer(self, ids: list[int], num_tokens: int = 12) -> list[int]:
        """Greedy tokens after these."""
        with torch.no_grad():
            out = self._model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return [int(token) for token in out[0, len(ids) :]]

    def answers(self) -> list[list[int]]:
        return [self.answer(ids) for ids in PROMPTS]

    def next_tokens(self, ids: list[int], start: int) -> list[int]:
        """For each place from ``start`` on the token that greedily follows what is before it."""
        with torch.no_grad():
            logits = self._model(torch.tensor([ids])).logits[0]
        return [int(token) for token in logits.argmax(-1)[start - 1 : -1]]


def replace(weights: dict[str, torch.Tensor], model: Path) -> None:
    """Fresh random values for all of them, in place."""
    with torch.no_grad():
        for name, value in random_state_dict(model).items():
            weights[name].copy_(value)
