"""The engine of the framework tests, and the proof that its live weights are those that a trainer saved."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors import safe_open
from tests.server.serve_process import serving
from tests.support.verified import comparison

from weightcast.testing.models import build_tiny_model

NUM_TOKENS = 8


@dataclass
class Served:
    """A running server. ``versions``: what it served each time it was found equal to a checkpoint."""

    url: str
    token: str
    model: Path
    folder: Path
    versions: list[str] = field(default_factory=list)

    def holds(self, checkpoint: Path) -> None:
        """Assert what ``weightcast verify`` finds: every tensor of the checkpoint is live, and the engine has no other."""
        found = comparison(self.url, self.token, checkpoint)
        names: set[str] = set()
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                names |= set(tensors.keys())
        assert found.proven, found
        assert set(found.equal) == names, found
        self.versions.append(found.version)

    def holds_model(self, model: Any) -> None:
        """Assert the same of a transformers model, saved as a trainer saves it."""
        checkpoint = self.folder / f"saved-{secrets.token_hex(4)}"
        model.save_pretrained(checkpoint)
        self.holds(checkpoint)

    def sample(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Sampled answers as TRL's ``rollout_func`` returns them."""
        body = {
            "model": "policy",
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": NUM_TOKENS,
            "temperature": 1.0,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60, trust_env=False)
        choices = answer.raise_for_status().json()["choices"]
        return {
            "prompt_ids": [list(prompt) for prompt in prompts],
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }


@contextmanager
def served_policy(folder: Path) -> Iterator[Served]:
    """A server of its own process, whose model is tiny and has random weights."""
    torch.set_num_threads(1)
    model = build_tiny_model(folder / "policy", "qwen3", "float32")
    token = secrets.token_hex(16)
    arguments = ("--token", token, "--dtype", "float32", "--device", "cpu", "--served-model-name", "policy")
    with serving(model, folder, *arguments) as server:
        yield Served(server.url, token, model, folder)


def even(answer: Sequence[int]) -> float:
    """The reward: the share of even tokens."""
    return sum(token % 2 == 0 for token in answer) / len(answer)
