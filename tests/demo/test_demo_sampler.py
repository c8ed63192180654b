"""Rollouts over HTTP, against replies made here: in any order, and broken in every way that matters."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from weightcast.errors import DeadlineExceeded, EngineError
from weightcast_demo import task
from weightcast_demo.sampler import HttpSampler

Change = Callable[[dict[str, Any]], None]


class Reply:
    """A stand-in for the server: random answers, every third one right, choices in random order."""

    def __init__(self, seed: int, change: Change | None = None) -> None:
        self.rng = random.Random(seed)
        self.change = change
        self.request: dict[str, Any] = {}
        self.choices: dict[int, dict[str, Any]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/completions"
        self.request = json.loads(request.content)
        for prompt_number, prompt in enumerate(self.request["prompt"]):
            for sample in range(self.request["n"]):
                index = prompt_number * self.request["n"] + sample
                self.choices[index] = self.choice(index, prompt)
        body = {"choices": self.rng.sample(list(self.choices.values()), len(self.choices))}
        if self.change:
            self.change(body)
        return httpx.Response(200, json=body)

    def choice(self, index: int, prompt: list[int]) -> dict[str, Any]:
        right = task.answers(torch.tensor([prompt]))[0].tolist()
        ids = right if index % 3 == 0 else [self.rng.randrange(10) for _ in range(self.rng.randrange(1, 10))]
        values = [-self.rng.random() for _ in ids]
        reason = "stop" if index % 3 == 0 else "length"
        return {"index": index, "token_ids": ids, "finish_reason": reason, "logprobs": {"token_logprobs": values}}

    def sampler(self) -> HttpSampler:
        client = httpx.Client(base_url="http://test", transport=httpx.MockTransport(self))
        return HttpSampler(client, model="m", timeout_s=1.0)


def test_rollouts_hold_every_answer_at_its_prompt() -> None:
    reply = Reply(61)
    prompts = task.SortingDigits(61).prompts(5)
    rollouts = reply.sampler().sample(prompts, group_size=4, seed=7)
    assert reply.request["prompt"] == prompts.tolist()
    assert (reply.request["seed"], reply.request["temperature"], reply.request["return_token_ids"]) == (7, 1.0, True)
    assert rollouts.prompts.tolist() == [prompt for prompt in prompts.tolist() for _ in range(4)]
    for index, choice in reply.choices.items():
        length = len(choice["token_ids"])
        assert rollouts.mask[index].sum() == length
        assert rollouts.mask[index, :length].all()
        assert rollouts.tokens[index, :length].tolist() == choice["token_ids"]
        assert set(rollouts.tokens[index, length:].tolist()) <= {task.PAD}
        assert rollouts.logprobs[index, :length].tolist() == pytest.approx(choice["logprobs"]["token_logprobs"])
        assert rollouts.rewards[index] == task.reward(rollouts.prompts[index].tolist(), choice["token_ids"])
    assert rollouts.num_tokens == sum(len(choice["token_ids"]) for choice in reply.choices.values())
    assert rollouts.mean_reward == pytest.approx(rollouts.rewards.sum().item() / 20)
    assert rollouts.rewards.sum() >= 7


def test_greedy_accuracy_counts_right_answers() -> None:
    reply = Reply(62)
    prompts = task.SortingDigits(62).prompts(9)
    answers = reply.sampler().greedy(prompts)
    accuracy = task.accuracy(prompts.tolist(), answers)
    right = [task.reward(p, reply.choices[i]["token_ids"]) for i, p in enumerate(prompts.tolist())]
    assert accuracy == sum(right) / 9
    assert reply.request["temperature"] == 0.0


def pop_choice(body: dict[str, Any]) -> None:
    body["choices"].pop()


def drop_ids(body: dict[str, Any]) -> None:
    del body["choices"][0]["token_ids"]


def drop_logprob(body: dict[str, Any]) -> None:
    body["choices"][0]["logprobs"]["token_logprobs"].pop()


def abort(body: dict[str, Any]) -> None:
    body["choices"][0]["finish_reason"] = "abort"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop_choice, "asked for 2 x 3 answers, got 5"),
        (drop_ids, "no token_ids"),
        (drop_logprob, "log-probabilities"),
        (abort, "ended by 'abort'"),
    ],
)
def test_incomplete_replies_are_refused(change: Change, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Reply(63, change).sampler().sample(task.SortingDigits(63).prompts(2), group_size=3, seed=1)


def failing(error: Exception | httpx.Response) -> HttpSampler:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(error, Exception):
            raise error
        return error

    client = httpx.Client(base_url="http://test", transport=httpx.MockTransport(handle))
    return HttpSampler(client, model="m", timeout_s=2.5)


def test_failures_are_named() -> None:
    prompts = task.SortingDigits(64).prompts(2)
    with pytest.raises(EngineError, match="answered 503: not yet"):
        failing(httpx.Response(503, text="not yet")).greedy(prompts)
    with pytest.raises(EngineError, match="cannot be reached: refused"):
        failing(httpx.ConnectError("refused")).greedy(prompts)
    with pytest.raises(DeadlineExceeded, match=r"2 prompts in 2\.5 s"):
        failing(httpx.ReadTimeout("slow")).greedy(prompts)
