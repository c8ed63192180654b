"""What the examples train: a tiny model that learns by REINFORCE to answer with even tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from weightcast.testing.models import build_tiny_model

NUM_TOKENS = 12
PROMPTS = [[number, number + 1, number + 2] for number in range(20, 52)]


def build(folder: Path) -> Path:
    """A model folder with random weights, for engine and trainer alike."""
    return build_tiny_model(folder / "policy", "qwen3", "float32", hidden_size=128, head_dim=32)


def on_a_cpu(folder: str, context_length: int = 64) -> dict[str, Any]:
    """What an ``sglang.Engine`` is made with on a machine without a GPU."""
    return {
        "model_path": folder,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.2,
        "max_total_tokens": 4096,
        "max_running_requests": 32,
        "context_length": context_length,
    }


def reward(answer: Sequence[int]) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in answer) / len(answer)


class Learner:
    """A policy and its optimizer."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
        """One policy-gradient step on sampled answers, all of one length; returns their mean reward."""
        rewards = torch.tensor([reward(answer) for answer in answers])
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        tokens = torch.tensor([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
        first = len(prompts[0])
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits[:, first - 1 :]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, first:, None]).squeeze(-1)
        self._optimizer.zero_grad()
        (-(advantage[:, None] * logprobs).mean()).backward()
        self._optimizer.step()
        return float(rewards.mean())
