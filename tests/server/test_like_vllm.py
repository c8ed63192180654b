"""What vLLM's clients ask for beyond a plain answer: the official openai client against the embedded engine, in this process."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from weightcast.engines.base import Logprob
from weightcast.engines.embedded import AsyncLLM
from weightcast.server import create_app
from weightcast.server.logprobs import completion_logprobs
from weightcast.testing.models import build_tiny_model
from weightcast.testing.tokenizer import build_tokenizer

PROMPT = "the rest of the tale"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}({{ tool.function.parameters.properties | list | join(',') }})"
    "{% endfor %}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}"
    "[{{ call.function.name }} n={{ call.function.arguments.n }}]{% endfor %}{% if message.role == 'tool' %}"
    "#{{ message.tool_call_id }}{% endif %}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("like-vllm") / "m", "qwen3", "float64")


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(folder, num_threads=1, served_model_name="policy", max_model_len=256)
    yield llm
    await llm.shutdown()


@pytest.fixture
async def http(engine: AsyncLLM) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(engine), client=("127.0.0.1", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://localhost:8000/v1", api_key="none", max_retries=0, http_client=http)


def reference_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of each token after the first, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float64", attn_implementation="eager").eval()
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    return rows[torch.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(
    client: openai.AsyncOpenAI, folder: Path, max_tokens: int, as_ids: bool, stream: bool
) -> None:
    """As the local-completions task of lm-eval asks, with texts and with token ids."""
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(PROMPT)
    asked: dict[str, Any] = {
        "model": "policy", "prompt": ids if as_ids else PROMPT, "echo": True, "logprobs": 2, "temperature": 0,
        "max_tokens": max_tokens, "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }  # fmt: skip
    if stream:
        pieces = [chunk.choices[0] async for chunk in await client.completions.create(**asked, stream=True)]
        text = "".join(piece.text for piece in pieces)
        parts = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        tokens, values, tops, offsets = (
            [item for part in parts for item in getattr(part, name) or []]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        made = [token for piece in pieces for token in piece.token_ids]  # type: ignore[attr-defined]
        assert pieces[-1].finish_reason == "length"
    else:
        answer = await client.completions.create(**asked)
        (choice,) = answer.choices
        assert choice.logprobs is not None
        text, made = choice.text, choice.token_ids  # type: ignore[attr-defined]
        tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
        tops, offsets = choice.logprobs.top_logprobs, choice.logprobs.text_offset
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), max_tokens)
        assert choice.prompt_token_ids == ids  # type: ignore[attr-defined]
    assert len(made) == max_tokens
    assert text == PROMPT + tokenizer.decode(made, skip_special_tokens=True)
    assert tokens == [tokenizer.decode([token]) for token in ids + made]
    assert values is not None
    assert tops is not None
    assert (values[0], tops[0]) == (None, None)
    assert offsets == [sum(map(len, tokens[:at])) for at in range(len(tokens))]
    expected = reference_logprobs(folder, ids + made)
    assert values[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    for name, value, top in zip(tokens[1:], values[1:], tops[1:], strict=True):
        assert top[name] == value or name == "\ufffd"  # so many tokens are parts of a character
        assert 2 - ("\ufffd" in top) <= len(top) <= 3  # and several of them have one name


async def test_an_evaluation_as_lm_eval_asks_it(http: httpx.AsyncClient, folder: Path) -> None:
    """The bodies that local-completions of lm-eval 0.4 sends, and its way to read the answers."""
    tokenizer = build_tokenizer()
    contexts = [tokenizer.encode(text) for text in ("the rest of", "a tale")]
    eos = tokenizer.eos_token or "<eos>"
    asked = {"model": "policy", "max_tokens": 3, "temperature": 0, "stop": ["\n\n", eos], "seed": 1234}
    made = (await http.post("/v1/completions", json={**asked, "prompt": contexts, "return_token_ids": True})).json()
    best = [choice["token_ids"] for choice in sorted(made["choices"], key=lambda choice: choice["index"])]
    assert all(0 < len(tokens) <= 3 for tokens in best)
    other = [[*tokens[:-1], (tokens[-1] + 1) % len(tokenizer)] for tokens in best]
    prompts = [context + end for ends in (best, other) for context, end in zip(contexts, ends, strict=True)]
    asked = {"model": "policy", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    told = (await http.post("/v1/completions", json={**asked, "prompt": prompts})).json()
    greedy = []
    for choice, prompt in zip(sorted(told["choices"], key=lambda choice: choice["index"]), prompts, strict=True):
        start = len(contexts[choice["index"] % 2])
        values, tops = (choice["logprobs"][name][start:-1] for name in ("token_logprobs", "top_logprobs"))
        assert len(values) == len(prompt) - start
        assert values == pytest.approx(reference_logprobs(folder, prompt)[start - 1 :].tolist(), abs=1e-4)
        greedy.append(all(value == max(top.values()) for value, top in zip(values, tops, strict=True)))
    assert greedy == [True, True, False, False]


def test_the_likeliest_of_tokens_with_one_name_is_the_one_that_is_shown() -> None:
    ranked = [(7, -0.5, "\ufffd"), (8, -1.5, "\ufffd"), (9, -2.5, "a")]
    entry = {
        token: Logprob(logprob=value, rank=rank, decoded_token=text)
        for rank, (token, value, text) in enumerate(ranked, start=1)
    }
    told = completion_logprobs([7], [entry], 3, 0, False, str)
    assert (told["token_logprobs"], told["top_logprobs"]) == ([-0.5], [{"\ufffd": -0.5, "a": -2.5}])


async def test_echo_of_several_prompts_and_answers(client: openai.AsyncOpenAI) -> None:
    prompts = ["one", "and another"]
    answer = await client.completions.create(model="policy", prompt=prompts, echo=True, max_tokens=3, n=2, seed=5)
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in answer.choices] == [True] * 4
    assert answer.choices[0].logprobs is None


async def test_forms_by_response_format(client: openai.AsyncOpenAI) -> None:
    tokenizer = build_tokenizer()
    no_space = {str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token])[:1].isspace()}
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    messages: Any = [{"role": "user", "content": "well?"}]
    answer = await client.chat.completions.create(
        model="policy", messages=messages, response_format=schema, n=4, seed=3, logit_bias=no_space, max_tokens=200
    )
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert set(found) == {"ok", "size"}
        assert isinstance(found["ok"], bool)
        assert found["size"] in (1, 2, 3)
        assert choice.finish_reason == "stop"
    stream = await client.chat.completions.create(
        model="policy",
        messages=messages,
        stream=True,
        max_tokens=30,
        extra_body={"structured_outputs": {"regex": "[xyz]{9}"}},
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert re.fullmatch("[xyz]{9}", text)
    anything: Any = {"type": "json_object"}
    whole = await client.chat.completions.create(
        model="policy", messages=messages, response_format=anything, seed=1, max_tokens=60
    )
    assert (whole.choices[0].message.content or "").startswith("{")


async def test_a_schema_without_sense_names_the_field_that_was_given(client: openai.AsyncOpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.UnprocessableEntityError, match="nonsense") as caught:
        await client.completions.create(model="policy", prompt="x", extra_body={"response_format": schema})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await client.completions.create(model="policy", prompt="x", extra_body={"structured_outputs": {"regex": "("}})
    assert caught.value.param == "structured_outputs"


async def test_penalties_and_biases_reach_the_engine(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "policy", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}

    async def tokens(**more: Any) -> list[int]:
        answer = await client.completions.create(**asked, **more, extra_body=extra)
        found: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
        return found

    plain = await tokens()
    assert len(set(await tokens(frequency_penalty=2.0, presence_penalty=2.0))) > len(set(plain))
    assert await tokens(logit_bias={"70": 100}) == [70] * 30
    assert plain[0] not in await tokens(logit_bias={str(plain[0]): -100})


async def test_tools_reach_the_template_and_the_history(client: openai.AsyncOpenAI, engine: AsyncLLM) -> None:
    engine.tokenizer.chat_template = TOOLS_TEMPLATE
    tools: Any = [
        {
            "type": "function",
            "function": {"name": "roll", "parameters": {"type": "object", "properties": {"n": {}, "m": {}}}},
        }
    ]
    call = {"id": "c7", "type": "function", "function": {"name": "roll", "arguments": '{"n": 4}'}}
    messages: Any = [
        {"role": "user", "content": "roll!"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c7", "content": "it is 3"},
    ]
    answer = await client.chat.completions.create(
        model="policy",
        messages=messages,
        tools=tools,
        tool_choice="auto",
        max_tokens=1,
        extra_body={"return_token_ids": True},
    )
    seen = engine.tokenizer.decode(answer.prompt_token_ids)  # type: ignore[attr-defined]
    assert seen == "<tool>roll(n,m)<user>roll!<assistant>[roll n=4]<tool>it is 3#c7<assistant>"


async def test_a_prompt_that_is_too_long_is_400_in_the_words_of_openai(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    for prompt in ([1] * 256, "word " * 900, "x" * 100_000):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens") as caught:
                await client.completions.create(model="policy", prompt=prompt, stream=stream)
            assert caught.value.param == "prompt"
    messages: Any = [{"role": "user", "content": "word " * 900}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        await client.chat.completions.create(model="policy", messages=messages)
    assert (await http.get("/load")).json() == {"server_load": 0}


async def test_unknown_fields_are_ignored_with_one_warning(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": "x", "max_tokens": 1, "colour": "red", "stream_options": None, "deep": [[{"a": 1}]]}
    with caplog.at_level(logging.WARNING, logger="weightcast"):
        for _ in range(3):
            assert (await http.post("/v1/completions", json=body)).status_code == 200
        more = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "colour": 1, "new\nline": 1}
        assert (await http.post("/v1/chat/completions", json=more)).status_code == 200
        hostile = {f"field-{number}": 1 for number in range(5000)}
        for _ in range(2):
            assert (await http.post("/v1/completions", json={**body, **hostile})).status_code == 200
    said = [record.getMessage() for record in caplog.records if "unknown fields" in record.getMessage()]
    assert len(said) == 3
    assert "colour, deep" in said[0]
    assert "colour" not in said[1]
    assert "new line" in said[1]
    assert len(said[2]) < 4000


async def test_tokens_and_back(http: httpx.AsyncClient) -> None:
    tokenizer = build_tokenizer()
    text = "the tale of ünïcödé"
    answer = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    ids = tokenizer.encode(text)
    assert answer == {
        "count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }  # fmt: skip
    assert (await http.post("/detokenize", json={"model": "policy", "tokens": ids})).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    chat = (await http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert tokenizer.decode(chat["tokens"]) == "<|user|>hi"
    assert chat["token_strs"] is None
    for path, body, status in (
        ("/tokenize", {}, 422),
        ("/tokenize", {"prompt": "x", "messages": messages}, 422),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404),
        ("/tokenize", {"prompt": "x" * 2**21}, 400),
        ("/detokenize", {"tokens": [-1]}, 422),
        ("/detokenize", {"tokens": [2**40]}, 422),
    ):
        assert (await http.post(path, json=body)).status_code == status, (path, str(body)[:80])


async def test_small_questions(http: httpx.AsyncClient, engine: AsyncLLM) -> None:
    assert (await http.get("/version")).json() == {"version": version("weightcast")}
    assert (await http.get("/ping")).status_code == (await http.post("/ping")).status_code == 200
    await engine.pause_generation("keep")
    task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}))
    async with asyncio.timeout(30):
        while (await http.get("/load")).json() != {"server_load": 1}:
            await asyncio.sleep(0.002)
    await engine.resume_generation()
    assert (await task).status_code == 200
    assert (await http.get("/load")).json() == {"server_load": 0}


async def test_a_large_body_leaves_the_event_loop_to_others(http: httpx.AsyncClient) -> None:
    """While 2 MB of text become tokens, other coroutines have hundreds of turns; on the loop itself they would have a handful."""
    turns = 0
    done = asyncio.create_task(http.post("/tokenize", json={"prompt": "lo " * 340_000}))
    while not done.done():
        turns += 1
        await asyncio.sleep(0)
    assert done.result().status_code == 200
    assert turns > 200
