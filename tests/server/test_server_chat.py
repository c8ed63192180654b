"""/v1/chat/completions against a scripted engine."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from server_helpers import client_for, events_of, joined

from weightcast.engines.base import SamplingParams
from weightcast.testing.scripted_engine import ScriptedEngine

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
RENDERED = "<|system|>be brief<|user|>hello there<|assistant|>"


async def chat(http: httpx.AsyncClient, **body: Any) -> Any:
    answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_answer(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await chat(http, max_completion_tokens=8, n=2, return_token_ids=True)
    ids = engine.tokenizer.encode(RENDERED)
    assert answer["prompt_token_ids"] == ids
    for index, choice in enumerate(answer["choices"]):
        tokens = engine.expected_tokens(ids, SamplingParams(max_tokens=8, n=2), index)
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == engine.tokenizer.decode(tokens)
        assert choice["token_ids"] == tokens
        assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"


async def test_no_limit_fills_the_context() -> None:
    engine = ScriptedEngine(max_model_len=64)
    async with client_for(engine) as http:
        answer = await chat(http)
    assert answer["usage"]["total_tokens"] == 64


@pytest.mark.parametrize("num_top", [None, 0, 3])
async def test_logprobs(http: httpx.AsyncClient, engine: ScriptedEngine, num_top: int | None) -> None:
    answer = await chat(http, max_tokens=5, logprobs=True, top_logprobs=num_top)
    content = answer["choices"][0]["logprobs"]["content"]
    tokens = engine.expected_tokens(engine.tokenizer.encode(RENDERED), SamplingParams(max_tokens=5))
    assert [entry["token"] for entry in content] == [engine.tokenizer.decode([token]) for token in tokens]
    assert [entry["logprob"] for entry in content] == [-0.75, -2.25, -0.75, -2.25, -0.75]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.75, -1.25, -1.75][: num_top or 0]


async def test_stream(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    whole = await chat(http, max_tokens=6, n=2, logprobs=True, top_logprobs=1)
    engine.token_delay_s = 0.01
    body = {"messages": MESSAGES, "max_tokens": 6, "n": 2, "logprobs": True, "top_logprobs": 1, "stream": True}
    answer = await http.post("/v1/chat/completions", json={**body, "stream_options": {"include_usage": True}})
    *chunks, last = events_of(answer.text)
    assert last["usage"] == whole["usage"]
    for wanted in whole["choices"]:
        pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == wanted["index"]]
        assert [piece["delta"].get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert "".join(piece["delta"]["content"] for piece in pieces) == wanted["message"]["content"]
        assert joined(piece["logprobs"]["content"] for piece in pieces) == wanted["logprobs"]["content"]
        assert pieces[-1]["finish_reason"] == "length"


async def test_content_parts_and_continuation(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = await chat(http, messages=[{"role": "user", "content": parts}], max_tokens=1, return_token_ids=True)
    assert engine.tokenizer.decode(answer["prompt_token_ids"]) == "<|user|>one\ntwo<|assistant|>"
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "let me"}]
    answer = await chat(http, messages=begun, max_tokens=1, continue_final_message=True, return_token_ids=True)
    assert engine.tokenizer.decode(answer["prompt_token_ids"]) == "<|user|>a<|assistant|>let me"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"echo": True}, "echo"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
    ({"continue_final_message": True, "messages": []}, "messages"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[f"{field}-{number}" for number, (_, field) in enumerate(BAD)])
async def test_bad_input_names_the_field(http: httpx.AsyncClient, body: dict[str, Any], field: str) -> None:
    answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == field


async def test_template_errors_are_the_callers(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 422
    assert "roles must alternate" in answer.json()["error"]["message"]


async def test_no_template(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.tokenizer.chat_template = None
    answer = await http.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "Unsupported")
