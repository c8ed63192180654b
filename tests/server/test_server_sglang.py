"""SGLang's native routes, as rollout clients of slime and AReaL call them."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx
import pytest
from server_helpers import client_for, events_of

from weightcast.server import ServerConfig
from weightcast.testing.scripted_engine import ScriptedEngine

SAMPLING = {
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 20,
    "max_new_tokens": 6,
    "stop_token_ids": None,
    "skip_special_tokens": False,
}


async def post(http: httpx.AsyncClient, path: str, body: Any, status: int = 200) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}"
    return answer.json() if answer.content else None


async def test_a_rollout_as_slime_asks_for_it(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {**SAMPLING, "no_stop_trim": True}, "return_logprob": True}
    answer = await post(http, "/generate", {**body, "rid": "r1"})
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 6 == meta["completion_tokens"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == answer["output_ids"]
    assert all(logprob <= 0 and text is None for logprob, _, text in meta["output_token_logprobs"])
    assert (meta["id"], meta["prompt_tokens"]) == ("r1", 3)
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["weight_version"], meta["weight_versions"]) == (
        "default",
        [{"version": "default", "start": 0, "end": 6}],
    )
    assert engine.sampling[-1].top_k == 20
    assert engine.sampling[-1].include_stop_str_in_output


async def test_several_prompts_texts_and_top_logprobs(http: httpx.AsyncClient) -> None:
    two = await post(
        http,
        "/generate",
        {"input_ids": [[5, 6], [7]], "sampling_params": [SAMPLING, {**SAMPLING, "max_new_tokens": 2}]},
    )
    assert [len(answer["output_ids"]) for answer in two] == [6, 2]
    assert "output_token_logprobs" not in two[0]["meta_info"]
    one = await post(
        http, "/generate",
        {"text": "hello", "sampling_params": SAMPLING, "return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True},
    )  # fmt: skip
    tops = one["meta_info"]["output_top_logprobs"]
    assert [len(top) for top in tops] == [2] * 6
    assert all(top[0][0] >= top[1][0] for top in tops)
    assert "".join(text for _, _, text in one["meta_info"]["output_token_logprobs"]) == one["text"]
    many = await post(http, "/generate", {"text": "hello", "sampling_params": {**SAMPLING, "n": 3}})
    assert len(many) == 3


async def test_a_stream_has_all_tokens_so_far_in_each_part(http: httpx.AsyncClient) -> None:
    answer = await http.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": SAMPLING, "stream": True})
    parts = events_of(answer.text)
    whole = await post(http, "/generate", {"input_ids": [5, 6, 7], "sampling_params": SAMPLING})
    assert parts[-1]["output_ids"] == whole["output_ids"]
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    for before, after in itertools.pairwise(parts):
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]


@pytest.mark.parametrize(("mode", "finish"), [("abort", "abort"), ("retract", "length"), ("in_place", "length")])
async def test_pauses_end_or_freeze_what_runs(mode: str, finish: str) -> None:
    engine = ScriptedEngine(token_delay_s=0.005)
    async with client_for(engine) as http:
        body = {"input_ids": [5], "sampling_params": {**SAMPLING, "max_new_tokens": 40}}
        running = asyncio.create_task(post(http, "/generate", body))
        while not (await engine.status()).num_running:
            await asyncio.sleep(0.005)
        await post(http, "/pause_generation", {"mode": mode})
        assert await engine.is_paused()
        await post(http, "/continue_generation", {"torch_empty_cache": False})
        assert not await engine.is_paused()
        answer = await running
        assert answer["meta_info"]["finish_reason"]["type"] == finish
    calls = [arguments for name, arguments in engine.calls if name == "pause_generation"]
    wanted = {"abort": ("abort", True), "retract": ("keep", True), "in_place": ("keep", False)}[mode]
    assert calls == [dict(zip(("mode", "clear_cache"), wanted, strict=True))]


async def test_versions_flushes_and_aborts(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.get("/flush_cache")).status_code == 200
    assert (await http.post("/flush_cache")).status_code == 200
    assert (await post(http, "/update_weight_version", {"new_version": "7", "abort_all_requests": True}))["success"]
    for path in ("/model_info", "/get_model_info"):
        info = (await http.get(path)).json()
        assert (info["weight_version"], info["is_generation"], info["model_path"]) == ("7", True, engine.model_name)
    answer = await post(http, "/generate", {"input_ids": [5], "sampling_params": SAMPLING})
    assert answer["meta_info"]["weight_version"] == "7"
    assert answer["output_ids"] == expected_of(engine, [5])
    await post(http, "/abort_request", {"rid": "nobody"})
    await post(http, "/abort_request", {"abort_all": True})
    assert (await http.get("/health_generate")).status_code == 200


def expected_of(engine: ScriptedEngine, prompt: list[int]) -> list[int]:
    return engine.expected_tokens(prompt, engine.sampling[-1])


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {}, "input_ids"),
        ("/generate", {"text": "a", "input_ids": [1]}, "input_ids"),
        ("/generate", {"input_ids": [1], "sampling_params": {"max_tokens": 3}}, "sampling_params.max_tokens"),
        ("/generate", {"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature"),
        ("/generate", {"input_ids": [[1], [2]], "sampling_params": [SAMPLING]}, "sampling_params"),
        ("/generate", {"input_ids": [1], "rid": ["a", "b"]}, "rid"),
        ("/pause_generation", {"mode": "often"}, "mode"),
        ("/abort_request", {}, "rid"),
    ],
)
async def test_bad_input_names_the_field(http: httpx.AsyncClient, path: str, body: Any, field: str) -> None:
    error = (await post(http, path, body, 422))["error"]
    assert error["param"] == field, error


@pytest.mark.parametrize(
    "path", ["/update_weights_from_disk", "/update_weights_from_tensor", "/release_memory_occupation"]
)
async def test_what_only_sglang_does_is_refused_by_name(http: httpx.AsyncClient, path: str) -> None:
    assert path in (await post(http, path, {}, 422))["error"]["message"]


async def test_pauses_and_flushes_need_the_token(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(token="t" * 16)) as http:
        for path in ("/pause_generation", "/continue_generation", "/flush_cache", "/abort_request"):
            await post(http, path, {}, 401)
        assert (await http.get("/flush_cache")).status_code == 401
