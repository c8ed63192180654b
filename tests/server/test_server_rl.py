"""vLLM's RL routes: its dialect, its clients' habits, and the order of calls."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import httpx
import pytest
from server_helpers import client_for

from weightcast.errors import DigestMismatch, EngineError, InvalidInput, LoadError, PeerLost
from weightcast.server import ServerConfig
from weightcast.testing.scripted_engine import ScriptedEngine

INIT = {"init_info": {"master_address": "127.0.0.1", "master_port": "51216", "rank_offset": 1, "world_size": 2}}
UPDATE = {"update_info": {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}}


async def post(http: httpx.AsyncClient, path: str, body: Any = None, status: int = 200, **query: Any) -> Any:
    answer = await http.post(path, json=body, params=query) if body is not None else await http.post(path, params=query)
    assert answer.status_code == status, f"{path}: {answer.status_code} {answer.text}"
    return answer.json()


async def test_a_round_as_trl_drives_it(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.get("/health")).status_code == 200
    model = (await http.get("/v1/models")).json()["data"][0]
    assert model["max_model_len"] == engine.max_model_len
    info = (await http.get("/server_info", params={"config_format": "json"})).json()["vllm_config"]
    assert info["weight_transfer_config"] is not None
    assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert (await http.get("/get_world_size")).json() == {"world_size": 1}
    await post(http, "/init_weight_transfer_engine", {"init_info": {**INIT["init_info"], "packed": True}})
    for round in range(2):
        await post(http, "/start_weight_update", {})
        await post(http, "/update_weights", UPDATE)
        await post(http, "/finish_weight_update", {})
        assert (await post(http, "/reset_prefix_cache"))["success"] is True
        assert (await engine.status()).num_syncs == round + 1
    answer = await post(
        http,
        "/v1/completions",
        {
            "model": model["id"],
            "prompt": [[5, 6, 7], "text"],
            "n": 2,
            "repetition_penalty": 1.0,
            "temperature": 0.9,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 4,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        },
    )
    for choice in answer["choices"]:
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        for token, value, top in zip(
            choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
        ):
            assert top == {f"token_id:{token}": value}


async def test_what_older_clients_send(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "/init_weight_transfer_engine", INIT)
    assert engine.named("init_weight_transfer_engine") == [INIT["init_info"]]
    await post(http, "/start_weight_update", {"is_checkpoint_format": True})
    packed = {"update_info": {**UPDATE["update_info"], "packed": True}}
    await post(http, "/update_weights", packed)
    await post(http, "/update_weights", {"update_info": [UPDATE["update_info"]]})
    assert engine.named("update_weights") == [packed["update_info"], UPDATE["update_info"]]
    await post(http, "/finish_weight_update", {"weight_version": 7})
    assert (await http.get("/weight_info")).json()["weight_version"] == "7"
    error = await post(http, "/start_weight_update", {"is_checkpoint_format": False}, status=422)
    assert "is_checkpoint_format" in error["error"]["message"]
    await post(http, "/start_weight_update")
    error = await post(http, "/update_weights", {"update_info": [{}, {}]}, status=422)
    assert error["error"]["param"] == "update_info"


WRONG_STATE = [
    ("/start_weight_update", None),
    ("/update_weights", UPDATE),
    ("/finish_weight_update", None),
    ("/finish_weight_update", {"weight_version": "3"}),
]


@pytest.mark.parametrize(("path", "body"), WRONG_STATE)
async def test_before_init_is_409(http: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: Any) -> None:
    error = await post(http, path, body, status=409)
    assert error["error"]["type"] == "StateError"
    assert (await engine.status()).num_syncs == 0


async def test_finish_without_start_and_second_start(http: httpx.AsyncClient) -> None:
    await post(http, "/init_weight_transfer_engine", INIT)
    await post(http, "/finish_weight_update", status=409)
    await post(http, "/start_weight_update")
    await post(http, "/start_weight_update", status=409)
    await post(http, "/update_weights", UPDATE)
    await post(http, "/finish_weight_update")


async def test_an_update_for_each_of_several_workers(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(*, include_dp: bool = True) -> int:
        return 2

    monkeypatch.setattr(engine, "get_world_size", two)
    async with client_for(engine) as http:
        await post(http, "/init_weight_transfer_engine", INIT)
        await post(http, "/start_weight_update")
        each = {"update_info": [UPDATE["update_info"]] * 2}
        told = (await post(http, "/update_weights", each, status=422))["error"]["message"]
        assert "needs an engine of one worker. Send one object for all" in told
        await post(http, "/update_weights", UPDATE)
        await post(http, "/finish_weight_update")


async def test_repeated_finish_is_harmless_only_when_equal(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    version = secrets.token_hex(4)
    await post(http, "/init_weight_transfer_engine", INIT)
    await post(http, "/start_weight_update")
    await post(http, "/update_weights", UPDATE)
    for _ in range(3):
        await post(http, "/finish_weight_update", {"weight_version": version})
    await post(http, "/finish_weight_update", {"weight_version": version + "x"}, status=409)
    assert (engine.version, (await engine.status()).num_syncs) == (version, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LoadError("no such tensor"), 422),
        (PeerLost("the trainer is gone"), 424),
        (DigestMismatch("bytes differ"), 424),
        (EngineError("engine thread died"), 424),
        (RuntimeError("a bug"), 424),
    ],
)
async def test_failed_update_is_never_5xx(engine: ScriptedEngine, error: Exception, status: int) -> None:
    async with client_for(engine) as http:
        await post(http, "/init_weight_transfer_engine", INIT)
        await post(http, "/start_weight_update")
        engine.fail("update_weights", error)
        answer = await post(http, "/update_weights", UPDATE, status=status)
        assert str(error) in answer["error"]["message"]
        await post(http, "/finish_weight_update", status=409)
        await post(http, "/start_weight_update")
        await post(http, "/update_weights", UPDATE)
        await post(http, "/finish_weight_update", {"weight_version": "after"})
        assert engine.version == "after"


async def test_a_call_past_the_servers_limit(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, finished = asyncio.Event(), asyncio.Event()
    original = engine.update_weights

    async def slow(info: Any) -> None:
        await go_on.wait()
        await original(info)
        finished.set()

    monkeypatch.setattr(engine, "update_weights", slow)
    async with client_for(engine, ServerConfig(weight_call_timeout_s=0.5)) as http:
        await post(http, "/init_weight_transfer_engine", INIT)
        await post(http, "/start_weight_update")
        error = await post(http, "/update_weights", UPDATE, status=424)
        assert error["error"]["type"] == "DeadlineExceeded"
        go_on.set()
        await finished.wait()
        await post(http, "/finish_weight_update", {"weight_version": "late"})
    assert engine.version == "late"


@pytest.mark.parametrize(
    ("query", "body", "wanted"),
    [
        ({}, None, {"mode": "abort", "clear_cache": True}),
        ({"mode": "keep"}, None, {"mode": "keep", "clear_cache": True}),
        ({"mode": "wait", "clear_cache": "False"}, None, {"mode": "wait", "clear_cache": False}),
        ({"clear_cache": "0"}, {"mode": "keep"}, {"mode": "keep", "clear_cache": False}),
        ({}, {"mode": "keep", "clear_cache": False}, {"mode": "keep", "clear_cache": False}),
        ({}, {"wait_for_inflight_requests": True}, {"mode": "wait", "clear_cache": True}),
    ],
)
async def test_pause_flags(
    http: httpx.AsyncClient, engine: ScriptedEngine, query: dict[str, Any], body: Any, wanted: Any
) -> None:
    for _ in range(2):
        assert await post(http, "/pause", body, **query) == {"status": "paused"}
    assert engine.named("pause_generation") == [wanted, wanted]
    assert (await http.get("/is_paused")).json() == {"is_paused": True}
    for _ in range(2):
        assert await post(http, "/resume") == {"status": "resumed"}
    assert (await http.get("/is_paused")).json() == {"is_paused": False}


async def test_pause_past_its_deadline_is_undone(engine: ScriptedEngine) -> None:
    engine.token_delay_s = 0.02
    async with client_for(engine) as http:
        task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 40}))
        while not engine.named("generate"):
            await asyncio.sleep(0.01)
        error = await post(http, "/pause", status=424, mode="wait", timeout_s="0.1")
        assert error["error"]["type"] == "DeadlineExceeded"
        assert not await engine.is_paused()
        assert (await asyncio.wait_for(task, 10)).json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "query", "body", "field"),
    [
        ("/pause", {"mode": "freeze"}, None, "mode"),
        ("/pause", {"clear_cache": "perhaps"}, None, "clear_cache"),
        ("/pause", {"timeout_s": "nan"}, None, "timeout_s"),
        ("/pause", {"timeout_s": "soon"}, None, "timeout_s"),
        ("/pause", {}, {"mode": 3}, "mode"),
        ("/reset_prefix_cache", {"reset_external": "maybe"}, None, "reset_external"),
        ("/abort_requests", {}, {"request_ids": "one"}, "request_ids"),
        ("/init_weight_transfer_engine", {}, {}, "init_info"),
        ("/init_weight_transfer_engine", {}, {"init_info": []}, "init_info"),
        ("/init_weight_transfer_engine", {}, {"init_info": {}}, "init_info"),
        ("/update_weights", {}, {"update_info": "w"}, "update_info"),
        ("/finish_weight_update", {}, {"weight_version": ""}, "weight_version"),
        ("/finish_weight_update", {}, {"weight_version": "a\nb"}, "weight_version"),
        ("/update_weight_version", {}, {}, "new_version"),
        ("/weight_checker", {}, {"action": "explode"}, "action"),
        ("/weight_checker", {}, {"action": "compare"}, "baseline"),
        ("/weight_checker", {}, {"action": "compare", "baseline": {"w": 3}}, "baseline[...]"),
        ("/start_weight_update", {}, {"colour": 1}, "colour"),
    ],
)
async def test_bad_input_names_the_field(
    http: httpx.AsyncClient, engine: ScriptedEngine, path: str, query: dict[str, Any], body: Any, field: str
) -> None:
    error = await post(http, path, body, status=422, **query)
    assert error["error"]["param"] == field
    assert not await engine.is_paused()


@pytest.mark.parametrize(
    ("field", "param"),
    [("round", "update_info.round"), ("update_info", "update_info"), ("body", "update_info"), (None, None)],
)
async def test_what_a_backend_refuses_is_named_by_its_place_in_the_body(
    http: httpx.AsyncClient, engine: ScriptedEngine, field: str | None, param: str | None
) -> None:
    await post(http, "/init_weight_transfer_engine", INIT)
    await post(http, "/start_weight_update")
    engine.fail("update_weights", InvalidInput("not like this", field=field))
    error = await post(http, "/update_weights", UPDATE, status=422)
    assert error["error"]["param"] == param


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
async def test_missing_body(http: httpx.AsyncClient, path: str) -> None:
    assert (await post(http, path, status=422))["error"]["param"] == "body"


async def test_checker(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    checksums = (await post(http, "/weight_checker", {"action": "checksum"}))["checksums"]
    assert checksums == await engine.checksums()
    same = await post(http, "/weight_checker", {"action": "compare", "baseline": checksums})
    assert same == {"match": True, "mismatches": []}
    other = {"head.weight": checksums["head.weight"], "extra": "00"}
    answer = await post(http, "/weight_checker", {"action": "compare", "baseline": other})
    assert answer == {"match": False, "mismatches": ["embed.weight", "extra"]}
    assert (await post(http, "/weight_checker", {"action": "reset"}, status=422))["error"]["type"] == "Unsupported"


async def test_version_label(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    version = secrets.token_hex(8)
    answer = await post(http, "/update_weight_version", {"new_version": version})
    assert answer == {"success": True, "new_version": version}
    assert engine.version == version


async def test_reset_flags(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "/reset_prefix_cache", reset_running_requests="true", reset_external="true")
    await post(http, "/reset_prefix_cache", {"reset_running_requests": True})
    await post(http, "/reset_prefix_cache", {"reset_running_requests": True}, reset_running_requests="false")
    assert engine.named("reset_prefix_cache") == [True, True, False]


async def test_abort_by_the_clients_id(engine: ScriptedEngine) -> None:
    engine.token_delay_s = 0.01
    async with client_for(engine) as http:
        name = secrets.token_hex(6)

        def start(**headers: str) -> asyncio.Task[httpx.Response]:
            body = {"prompt": ["a", "b"], "max_tokens": 1500}
            return asyncio.create_task(http.post("/v1/completions", json=body, headers=headers))

        mine, other = start(**{"x-request-id": name}), start()
        while len(engine.named("generate")) < 4:
            await asyncio.sleep(0.01)
        assert await post(http, "/abort_requests", {"request_ids": ["unknown"]}) == {"status": "aborted", "aborted": 0}
        answer = await post(http, "/abort_requests", {"request_ids": [f"cmpl-{name}"]})
        assert answer == {"status": "aborted", "aborted": 2}
        reasons = [choice["finish_reason"] for choice in (await asyncio.wait_for(mine, 5)).json()["choices"]]
        assert reasons == ["abort", "abort"]
        assert not other.done()
        assert (await post(http, "/abort_requests"))["aborted"] == 2
        assert (await asyncio.wait_for(other, 5)).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_draft_weight_update", "/collective_rpc", "/sleep"],
)
async def test_refused_by_name(http: httpx.AsyncClient, path: str) -> None:
    error = await post(http, path, {"lora_name": "a", "lora_path": "/b"}, status=422)
    assert error["error"]["type"] == "Unsupported"
    assert path in error["error"]["message"]


async def test_shutdown_and_init_again(http: httpx.AsyncClient) -> None:
    await post(http, "/init_weight_transfer_engine", INIT)
    for _ in range(2):
        await post(http, "/shutdown_weight_transfer_engine")
    await post(http, "/start_weight_update", status=409)
    await post(http, "/init_weight_transfer_engine", INIT)
    await post(http, "/start_weight_update")


async def test_alive_is_not_ready() -> None:
    engine = ScriptedEngine(wait_for_weights=True)
    async with client_for(engine) as http:
        assert (await http.get("/health")).json() == {"status": "ok", "weight_version": "default", "ready": False}
        answer = await http.get("/ready")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "waiting for weights" in answer.json()["error"]["message"]
        await post(http, "/init_weight_transfer_engine", INIT)
        await post(http, "/start_weight_update")
        await post(http, "/update_weights", UPDATE)
        await post(http, "/finish_weight_update", {"weight_version": "1"})
        assert (await http.get("/health")).json() == {"status": "ok", "weight_version": "1", "ready": True}
        assert (await http.get("/ready")).json() == {"status": "ready", "weight_version": "1"}
        engine.dirty = True
        assert (await http.get("/health")).status_code == 200, "the next update heals it: no reason to restart it"
        assert (await http.get("/ready")).status_code == 503
        await engine.shutdown()
        assert (await http.get("/health")).status_code == 503
