"""/v1/completions against a scripted engine: every token is known beforehand."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from server_helpers import client_for, events_of, joined

from weightcast.engines.base import RequestOutputKind, SamplingParams
from weightcast.errors import EngineError, StateError
from weightcast.server import ServerConfig
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.testing.tokenizer import VOCAB_SIZE


def random_ids(num: int) -> list[int]:
    return [random.randrange(VOCAB_SIZE) for _ in range(num)]


async def complete(http: httpx.AsyncClient, **body: Any) -> Any:
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_text_prompt(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    seed = random.getrandbits(63)
    answer = await complete(http, model="scripted", prompt="once upon", max_tokens=9, seed=seed)
    prompt_ids = engine.tokenizer.encode("once upon")
    tokens = engine.expected_tokens(prompt_ids, SamplingParams(max_tokens=9, seed=seed))
    (choice,) = answer["choices"]
    assert choice["text"] == engine.tokenizer.decode(tokens)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 9}]
    assert "token_ids" not in choice
    assert answer["usage"] == {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": 9,
        "total_tokens": len(prompt_ids) + 9,
    }
    assert answer["object"] == "text_completion"


@pytest.mark.parametrize("n", [1, 3])
async def test_choices_are_prompt_major(http: httpx.AsyncClient, engine: ScriptedEngine, n: int) -> None:
    prompts: list[Any] = [random_ids(5), "a text", random_ids(2)]
    answer = await complete(http, prompt=prompts, n=n, max_tokens=4, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(3 * n))
    for number, choice in enumerate(answer["choices"]):
        prompt = prompts[number // n]
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == engine.expected_tokens(ids, SamplingParams(n=n, max_tokens=4), number % n)


async def test_one_list_of_ids_is_one_prompt(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    ids = random_ids(7)
    answer = await complete(http, prompt=ids, max_tokens=3, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [ids]


@pytest.mark.parametrize("num_top", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_logprobs(http: httpx.AsyncClient, engine: ScriptedEngine, num_top: int, as_ids: bool) -> None:
    ids = random_ids(4)
    answer = await complete(
        http, prompt=ids, max_tokens=6, logprobs=num_top, return_tokens_as_token_ids=as_ids, return_token_ids=True
    )
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    tokens = engine.expected_tokens(ids, SamplingParams(max_tokens=6))
    names = [f"token_id:{token}" if as_ids else engine.tokenizer.decode([token]) for token in tokens]
    assert choice["token_ids"] == tokens
    assert logprobs["tokens"] == names
    assert logprobs["token_logprobs"] == [-0.75 if position % 2 == 0 else -2.25 for position in range(6)]
    assert logprobs["text_offset"] == list(range(6))
    for position, top in enumerate(logprobs["top_logprobs"]):
        assert top[names[position]] == logprobs["token_logprobs"][position]
        ranks = {1 + (-value - 0.75) / 0.5 for value in top.values()}
        assert ranks == {1.0 if position % 2 == 0 else 4.0} | {float(rank + 1) for rank in range(num_top)}


async def test_prompt_logprobs(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    ids = random_ids(5)
    answer = await complete(http, prompt=ids, max_tokens=1, prompt_logprobs=0)
    entries = answer["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert [list(entry) for entry in entries[1:]] == [[str(token)] for token in ids[1:]]
    for token, entry in zip(ids[1:], entries[1:], strict=True):
        rank = 2 + token % 5
        decoded = engine.tokenizer.decode([token])
        assert entry[str(token)] == {"logprob": -0.25 - 0.5 * rank, "rank": rank, "decoded_token": decoded}


async def test_stream_adds_up_to_the_whole(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {
        "prompt": [random_ids(4), random_ids(6)],
        "n": 2,
        "max_tokens": 7,
        "logprobs": 2,
        "return_token_ids": True,
        "seed": 5,
    }
    whole = await complete(http, **body)
    engine.token_delay_s = 0.01
    answer = await http.post(
        "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(answer.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for wanted in whole["choices"]:
        pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == wanted["index"]]
        assert len(pieces) > 1
        assert "".join(piece["text"] for piece in pieces) == wanted["text"]
        assert joined(piece["token_ids"] for piece in pieces) == wanted["token_ids"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert joined(piece["logprobs"][name] for piece in pieces) == wanted["logprobs"][name]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert pieces[0]["prompt_token_ids"] == wanted["prompt_token_ids"]
        assert pieces[-1]["weight_versions"] == wanted["weight_versions"]


async def test_continuous_usage(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await http.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 3, "stream": True, "stream_options": options}
    )
    counts = [event["usage"]["completion_tokens"] for event in events_of(answer.text)]
    assert counts == sorted(counts)
    assert counts[-1] == 3


async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    fields = {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 12,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 2**63 + 11,
        "stop_token_ids": [3, 4],
        "max_tokens": 5,
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 3,
        "prompt_logprobs": 1,
    }
    await complete(http, prompt="x", stop=["Qq", "Zz"], **fields)
    final = RequestOutputKind.FINAL_ONLY
    wanted = SamplingParams(**{**fields, "stop": ("Qq", "Zz"), "stop_token_ids": (3, 4)}, output_kind=final)
    assert engine.sampling == [wanted]


async def test_null_means_default(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    names = ("n", "temperature", "top_p", "seed", "stop", "logprobs", "max_tokens", "echo", "suffix", "stream_options")
    await complete(http, prompt="x", **dict.fromkeys(names))
    assert engine.sampling == [SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)]


async def test_stop_string(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    ids = random_ids(3)
    tokens = engine.expected_tokens(ids, SamplingParams(max_tokens=40))
    text = engine.tokenizer.decode(tokens)
    stop = text[10]
    answer = await complete(http, prompt=ids, max_tokens=40, stop=stop)
    (choice,) = answer["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


async def test_versions_across_a_sync(engine: ScriptedEngine) -> None:
    async with client_for(engine) as http:
        await engine.init_weight_transfer_engine({"any": 1})
        chunks = []
        async with http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}) as got:
            chunks = [line async for line in got.aiter_lines() if line.startswith("data: {")]
        assert json.loads(chunks[-1][6:])["choices"][0]["weight_versions"][-1]["version"] == "default"
        await engine.start_weight_update()
        await engine.update_weights({"any": 1})
        await engine.finish_weight_update("v7")
        answer = await complete(http, prompt="x", max_tokens=2)
    assert answer["choices"][0]["weight_versions"] == [{"version": "v7", "start": 0, "end": 2}]


BAD = [
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "seed": 2**70}, "seed"),
    ({"prompt": "x", "stop": [1]}, "stop[0]"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [1, [2]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [VOCAB_SIZE]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "guided_regex": "a"}, "guided_regex"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "x", "structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {}}, "structured_outputs"),
    ({"prompt": "x", "structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ({"prompt": "x", "response_format": {"type": "yaml"}}, "response_format.type"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"prompt": "x", "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"prompt": [[5]] * 16385}, "prompt"),
    ({"prompt": [[5]] * 9, "n": 2000}, "prompt"),
]


@pytest.mark.parametrize(("body", "field"), BAD, ids=[f"{field}-{number}" for number, (_, field) in enumerate(BAD)])
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input_names_the_field(
    http: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], field: str, stream: bool
) -> None:
    if stream and field != "stream_options":
        body = {**body, "stream": True}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["code"] == 422
    assert error["type"] in ("InvalidInput", "UnsupportedField")
    assert (await engine.status()).num_running == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"   ", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"],
)
async def test_garbage_body(http: httpx.AsyncClient, data: bytes) -> None:
    answer = await http.post("/v1/completions", content=data)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] in ("body", "prompt")


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={"model": "gpt-9", "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"


async def test_body_limit(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(max_body_nbytes=1000)) as http:
        assert (await http.post("/v1/completions", json={"prompt": "x" * 2000})).status_code == 413

        async def parts() -> Any:
            for _ in range(30):
                yield b" " * 100

        assert (await http.post("/v1/completions", content=parts())).status_code == 413
        assert (await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_engine_failure_before_the_first_token(
    http: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    engine.fail("generate", EngineError("the engine thread died"))
    answer = await http.post("/v1/completions", json={"prompt": "x", "stream": stream})
    assert answer.status_code == 503
    assert "the engine thread died" in answer.json()["error"]["message"]


async def test_engine_failure_in_the_middle_of_a_stream(engine: ScriptedEngine) -> None:
    engine.token_delay_s = 0.02
    async with client_for(engine) as http:

        async def later() -> None:
            await asyncio.sleep(0.1)
            engine.fail("token", EngineError("bad luck"))

        task = asyncio.create_task(later())
        answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 200, "stream": True})
        await task
    events = events_of(answer.text)
    assert answer.status_code == 200
    assert len(events) > 2
    assert "bad luck" in events[-1]["error"]["message"]
    assert events[-1]["error"]["type"] == "EngineError"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_is_for_later(http: httpx.AsyncClient, engine: ScriptedEngine, stream: bool) -> None:
    engine.fail("generate", StateError("the queue is full"))
    answer = await http.post("/v1/completions", json={"prompt": ["a", "b"], "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "StateError"
    assert (await engine.status()).num_running == 0


async def test_not_ready() -> None:
    waiting = ScriptedEngine(wait_for_weights=True)
    async with client_for(waiting) as http:
        answer = await http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503
        assert "waiting for weights" in answer.json()["error"]["message"]
        assert waiting.named("generate") == []
