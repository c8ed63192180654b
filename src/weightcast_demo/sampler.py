"""Rollouts over HTTP: token ids in, token ids and log-probabilities out, by the server's /v1/completions."""

from __future__ import annotations

import time
from typing import Any

import httpx
import torch

from weightcast.errors import DeadlineExceeded, EngineError
from weightcast_demo import task
from weightcast_demo.grpo import Rollouts


class HttpSampler:
    """Asks one server for answers. ``model`` is the name that the server knows it by."""

    def __init__(self, client: httpx.Client, *, model: str, timeout_s: float = 60.0) -> None:
        self._client = client
        self._model = model
        self._timeout_s = timeout_s

    def sample(self, prompts: torch.Tensor, *, group_size: int, seed: int) -> Rollouts:
        """``group_size`` answers to each prompt at temperature 1, scored. Equal weights and seeds give equal answers."""
        began = time.perf_counter()
        choices = self._complete(prompts, n=group_size, temperature=1.0, seed=seed, logprobs=0)
        seconds = time.perf_counter() - began
        repeated = prompts.repeat_interleave(group_size, dim=0)
        rows = [_sampled(choice) for choice in choices]
        longest = max(len(tokens) for tokens, _ in rows)
        tokens = torch.full((len(rows), longest), task.PAD)
        logprobs = torch.zeros(len(rows), longest)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (ids, values) in enumerate(rows):
            tokens[row, : len(ids)] = torch.tensor(ids)
            logprobs[row, : len(ids)] = torch.tensor(values)
            mask[row, : len(ids)] = True
        rewards = [task.reward(prompt, ids) for prompt, (ids, _) in zip(repeated.tolist(), rows, strict=True)]
        return Rollouts(
            prompts=repeated,
            tokens=tokens,
            logprobs=logprobs,
            mask=mask,
            rewards=torch.tensor(rewards),
            group_size=group_size,
            seconds=seconds,
        )

    def greedy(self, prompts: torch.Tensor) -> list[list[int]]:
        """The server's likeliest answer to each prompt, as token ids."""
        return [_token_ids(choice) for choice in self._complete(prompts, n=1, temperature=0.0)]

    def _complete(self, prompts: torch.Tensor, *, n: int, **sampling: Any) -> list[dict[str, Any]]:
        body = {
            "model": self._model,
            "prompt": prompts.tolist(),
            "n": n,
            "max_tokens": prompts.shape[1] - 1,
            "return_token_ids": True,
            **sampling,
        }
        try:
            reply = self._client.post("/v1/completions", json=body, timeout=self._timeout_s)
        except httpx.TimeoutException:
            raise DeadlineExceeded(
                f"the server did not answer {len(prompts)} prompts in {self._timeout_s:g} s"
            ) from None
        except httpx.TransportError as error:
            raise EngineError(f"the server cannot be reached: {error}", engine=str(self._client.base_url)) from None
        if reply.status_code != 200:
            raise EngineError(f"/v1/completions answered {reply.status_code}: {reply.text[:400]}")
        choices: list[dict[str, Any]] = sorted(reply.json()["choices"], key=lambda choice: int(choice["index"]))
        if len(choices) != len(prompts) * n:
            raise EngineError(f"asked for {len(prompts)} x {n} answers, got {len(choices)}")
        return choices


def _token_ids(choice: dict[str, Any]) -> list[int]:
    if choice.get("finish_reason") not in ("stop", "length"):
        raise EngineError(f"answer {choice.get('index')} ended by {choice.get('finish_reason')!r}")
    ids = choice.get("token_ids")
    if not ids:
        raise EngineError(f"answer {choice.get('index')} has no token_ids")
    return [int(token) for token in ids]


def _sampled(choice: dict[str, Any]) -> tuple[list[int], list[float]]:
    ids = _token_ids(choice)
    values = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(values) != len(ids):
        raise EngineError(f"answer {choice.get('index')} has {len(ids)} tokens and {len(values)} log-probabilities")
    return ids, [float(value) for value in values]
