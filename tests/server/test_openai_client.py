"""The official openai client, unmodified, against a weightcast serve process."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator

import httpx
import openai
import pytest
from serve_process import Served, serving

from weightcast.testing.models import build_tiny_model
from weightcast.testing.tokenizer import VOCAB_SIZE, build_tokenizer

NAME = "tiny-policy"
MESSAGES = [{"role": "user", "content": "tell me a thing"}]
KEY = secrets.token_urlsafe(12)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("openai")
    model = build_tiny_model(folder / "model", "qwen3", "float64")
    options = ("--served-model-name", NAME, "--dtype", "float64", "--max-model-len", 256, "--num-threads", 1)
    with serving(model, folder, *options, WEIGHTCAST_API_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.max_model_len == 256  # type: ignore[attr-defined]


def test_completion_and_its_stream_agree(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": "once upon a time", "max_tokens": 24, "temperature": 0.8, "seed": 1234}
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    other = client.completions.create(**{**asked, "seed": 1235})
    assert other.choices[0].text != whole.choices[0].text


def test_n_greedy_outputs_are_equal_and_token_ids_in_give_token_ids_out(client: openai.OpenAI) -> None:
    ids = build_tokenizer().encode("a prompt of tokens")
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(
        model=NAME, prompt=[ids, ids[::-1]], n=2, max_tokens=8, temperature=0, logprobs=0, extra_body=extra
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    outputs = [choice.token_ids for choice in answer.choices]  # type: ignore[attr-defined]
    assert outputs[0] == outputs[1]
    assert outputs[2] == outputs[3]
    assert outputs[0] != outputs[2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]  # type: ignore[attr-defined]
        assert choice.weight_versions == [{"version": "default", "start": 0, "end": 8}]  # type: ignore[attr-defined]


def test_all_logprobs_make_a_distribution(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="x", max_tokens=3, logprobs=VOCAB_SIZE, temperature=0.7,
                                       extra_body={"return_tokens_as_token_ids": True})  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for top in logprobs.top_logprobs or []:
        assert len(top) == VOCAB_SIZE
        assert math.fsum(math.exp(value) for value in top.values()) == pytest.approx(1, abs=1e-4)


def test_chat(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 12, "seed": 77, "n": 2}
    asked["extra_body"] = {"ignore_eos": True}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    for choice in answer.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert len(entries) == 12
        for entry in entries:
            values = [top.logprob for top in entry.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert len(values) == 3
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices:
            texts[piece.index] += piece.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_stop(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": "stop here", "max_tokens": 60, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:7]
    whole = client.completions.create(**asked, stop=[stop])
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stop=[stop], stream=True))
    assert whole.choices[0].text == streamed == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"


def test_prompt_logprobs_agree_with_those_of_sampling(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as http:
        ids = build_tokenizer().encode("scored by a teacher")
        body = {
            "prompt": [ids],
            "max_tokens": 6,
            "temperature": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
            "seed": 3,
        }
        (choice,) = http.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        scored = {"prompt": [ids + choice["token_ids"]], "max_tokens": 1, "prompt_logprobs": 0}
        (teacher,) = http.post("/v1/completions", json=scored).raise_for_status().json()["choices"]
        entries = teacher["prompt_logprobs"][len(ids) :]
        given = [entry[str(token)]["logprob"] for token, entry in zip(choice["token_ids"], entries, strict=True)]
        assert given == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)


def test_errors(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="temperature") as caught:
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="other", prompt="x")
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


async def test_many_at_once(served: Served) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:

        async def one(seed: int) -> str:
            asked = {"model": NAME, "prompt": f"number {seed}", "max_tokens": 10 + seed, "seed": seed}
            pieces = [chunk.choices[0].text async for chunk in await client.completions.create(**asked, stream=True)]
            return "".join(pieces)

        together = await asyncio.gather(*(one(seed) for seed in range(12)))
        assert together == [await one(seed) for seed in range(12)]
