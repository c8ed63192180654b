"""TRL's GRPOTrainer with rollouts from a served engine: a callback publishes, and rollouts come from the server's OpenAI routes.

python examples/trl_grpo.py [--engine embedded|vllm] [--steps 8]
"""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import httpx
from datasets import Dataset
from policy import NUM_TOKENS, PROMPTS, build, reward
from rlhf_http import START_TIMEOUT_S, serve
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from weightcast.integrations.trl import PublishCallback

GROUP = 8


class Rollouts:
    """TRL's ``rollout_func``: answers from the server, with the logprobs they were sampled with."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [trainer.processing_class.encode(prompt) for prompt in prompts]
        body = {
            "model": "policy",
            "prompt": ids,
            "max_tokens": NUM_TOKENS,
            "temperature": 1.0,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        choices = self._client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        return {
            "prompt_ids": ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }


def rewards(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """What TRL asks about each answer."""
    return [reward(answer) for answer in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    token = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer.decode(ids) for ids in PROMPTS]
        config = GRPOConfig(
            output_dir=str(Path(scratch) / "run"),
            per_device_train_batch_size=8 * GROUP,
            num_generations=GROUP,
            max_completion_length=NUM_TOKENS,
            max_steps=options.steps,
            learning_rate=1e-2,
            beta=0.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        with serve(options.engine, folder, token) as url:
            trainer = GRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(folder),
                processing_class=tokenizer,
                args=config,
                reward_funcs=rewards,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                rollout_func=Rollouts(url),
                callbacks=[PublishCallback([url], token=token, wait_s=START_TIMEOUT_S)],
            )
            trainer.train()
        seen = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {seen[0]:.2f} -> {seen[-1]:.2f}")


if __name__ == "__main__":
    main()
