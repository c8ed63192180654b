"""A GRPO run of TRL's that really learns, small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tests.frameworks.served import NUM_TOKENS, Served, even
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

GROUP = 4
STEPS = 3
PROMPTS = [[number, number + 1, number + 2] for number in range(40, 48)]


class After(TrainerCallback):
    """Calls a function with the model when training begins and after every step, behind the callbacks that were given before."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        self._look = look

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._look(model)


def rewards(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """What TRL asks about each answer."""
    return [even(answer) for answer in completion_ids]


def grpo(served: Served, folder: Path, *, callbacks: list[Any], steps: int = STEPS, **more: Any) -> GRPOTrainer:
    """A trainer over the served policy's model; ``more`` goes to its config, or to the trainer by the names below."""
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    given = {name: more.pop(name) for name in ("rollout_func", "peft_config") if name in more}
    config = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(PROMPTS) * GROUP,
        "num_generations": GROUP,
        "max_completion_length": NUM_TOKENS,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "beta": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32),
        processing_class=tokenizer,
        args=GRPOConfig(**config),
        reward_funcs=rewards,
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in PROMPTS]}),
        callbacks=callbacks,
        **given,
    )


def rollouts(served: Served) -> Callable[..., dict[str, Any]]:
    """TRL's ``rollout_func`` over the server's OpenAI routes."""

    def sample(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        return served.sample([trainer.processing_class.encode(prompt) for prompt in prompts])

    return sample
