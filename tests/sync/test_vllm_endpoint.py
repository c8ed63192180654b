"""The routes beside vLLM's own: its /finish_weight_update must not name a version that some worker does not serve."""

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tests.support.scripted_vllm import Failure, ScriptedVllm

from weightcast.commit.worker_outcome import NO_VERSION
from weightcast.engines.vllm.endpoint import WeightcastEndpoints
from weightcast.errors import InvalidInput

TOLD = ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"]
STOCK = {"/finish_weight_update": ["POST"], "/get_world_size": ["GET"], "/weight_info": ["GET"]} | {
    key: ["POST"] for key in TOLD
}


async def server(engine: ScriptedVllm, *, development: bool) -> httpx.AsyncClient:
    async def stock(request: Request) -> JSONResponse:
        if b"fail" in await request.body():
            return JSONResponse({"stock": "failed"}, 500)
        return JSONResponse({"stock": request.url.path})

    routes = [Route(path, stock, methods=methods) for path, methods in STOCK.items()]
    app = Starlette(routes=routes if development else [])
    endpoints = WeightcastEndpoints()
    endpoints.attach_router(app)
    await endpoints.init_state(engine, app.state, None)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1")


async def test_without_development_mode_there_is_no_route_to_finish() -> None:
    async with await server(ScriptedVllm(), development=False) as client:
        assert (await client.post("/finish_weight_update")).status_code == 404
        assert (await client.get("/get_world_size")).json() == {"world_size": 1}
        assert (await client.get("/weight_info")).json() == {"weight_version": "default"}


async def test_vllms_other_routes_stay_its_own() -> None:
    async with await server(ScriptedVllm(), development=True) as client:
        assert (await client.get("/weight_info")).json() == {"stock": "/weight_info"}


@pytest.mark.parametrize("development", [False, True])
async def test_weights_that_were_lost_in_a_sleep_are_no_version_on_any_route(development: bool) -> None:
    """vLLM's label would go on naming the version before."""
    engine = ScriptedVllm(2)
    for worker in engine.workers:
        worker.version = "2-y"
    engine.workers[1].version, engine.workers[1].dirty = NO_VERSION, True
    engine.workers[0].version, engine.workers[0].dirty = NO_VERSION, True
    engine.label = "2-y"
    async with await server(engine, development=development) as client:
        assert (await client.get("/weight_info")).json() == {"weight_version": NO_VERSION}
        status = (await client.get("/weightcast/status")).json()
        assert (status["weight_version"], status["digest"], status["ready"]) == (NO_VERSION, None, False)
        for number, worker in enumerate(engine.workers):
            worker.call("update", {"action": "commit", "round": number, "version": "3-z"})
        expected = {"stock": "/weight_info"} if development else {"weight_version": "3-z"}
        assert (await client.get("/weight_info")).json() == expected


async def test_memory_is_woken_up_by_a_route() -> None:
    engine = ScriptedVllm(2)
    async with await server(engine, development=False) as client:
        answer = await client.post("/weightcast/wake", json={"tags": []})
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "Unsupported")
        engine.vllm_config.model_config.enable_sleep_mode = True
        engine.fall_asleep()
        for tags, left in ((["weights"], ["kv_cache"]), (["weights"], ["kv_cache"]), ([], []), ([], [])):
            assert engine.paused == (engine.workers[0].asleep != ())
            answer = await client.post("/weightcast/wake", json={"tags": tags})
            assert (answer.status_code, answer.json()) == (200, {"asleep": left})
        assert engine.calls.count("wake ['weights']") == 1
        assert not engine.paused
        engine.fall_asleep()
        engine.seconds["wake"] = 5.0
        answer = await client.post("/weightcast/wake", json={"timeout_s": 0.1})
        assert answer.json()["error"]["type"] == "DeadlineExceeded"
        for body in ({"timeout_s": 0}, {"tags": "weights"}, {"tags": [""]}, {"more": 1}):
            assert (await client.post("/weightcast/wake", json=body)).status_code == 422


@pytest.mark.parametrize("body", [None, {}, {"weight_version": None}, {"weight_version": "3-z"}])
async def test_a_finished_update_is_named(body: Any) -> None:
    engine = ScriptedVllm(2)
    for worker in engine.workers:
        worker.version = "2-y"
    async with await server(engine, development=True) as client:
        answer = await client.post("/finish_weight_update", json=body)
    assert (answer.status_code, answer.json()) == (200, {"message": "Weight update finished"})
    assert engine.label == (body or {}).get("weight_version") or "2-y"


@pytest.mark.parametrize("dirty", [False, True])
async def test_an_update_that_a_worker_could_not_carry_out_is_not_named(dirty: bool) -> None:
    engine = ScriptedVllm(2)
    engine.workers[1].fails["commit"] = Failure(dirty=dirty)
    engine.workers[1].call("update", {"action": "commit", "round": 1, "version": "1-x"})
    async with await server(engine, development=True) as client:
        answer = await client.post("/finish_weight_update", json={"weight_version": "1-x"})
        status = (await client.get("/weightcast/status")).json()
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "LoadError"
    assert engine.label == "default"
    assert (status["weight_version"], status["dirty"]) == ("default", dirty)
    assert engine.paused is dirty


async def test_an_update_of_vllms_own_routes_lets_a_held_engine_go_on() -> None:
    engine = ScriptedVllm()
    (worker,) = engine.workers
    worker.fails["commit"] = Failure(dirty=True)
    async with await server(engine, development=True) as client:
        for number, status_code in ((1, 422), (2, 200)):
            worker.call("update", {"action": "commit", "round": number, "version": f"{number}-x"})
            assert (await client.post("/finish_weight_update")).status_code == status_code
            assert (engine.paused, worker.held) == (number == 1, number == 1)
    assert engine.label == "2-x"


@pytest.mark.parametrize("path", TOLD)
@pytest.mark.parametrize(("kind", "status_code"), [("StateError", 409), ("InvalidInput", 422), ("DigestMismatch", 424)])
async def test_a_call_that_a_worker_refused_is_not_answered_200(path: str, kind: str, status_code: int) -> None:
    engine = ScriptedVllm(2)
    async with await server(engine, development=True) as client:
        answer = await client.post(path, json={})
        assert (answer.status_code, answer.json()) == (200, {"stock": path})
        engine.workers[1].error = kind
        answer = await client.post(path, json={})
    assert answer.status_code == status_code
    assert answer.json()["error"]["type"] == kind
    assert engine.calls.count("finish") == (path != "/init_weight_transfer_engine"), "no update stays open"


@pytest.mark.parametrize("path", [*TOLD, "/finish_weight_update"])
async def test_with_another_backend_vllms_routes_answer_by_themselves(path: str) -> None:
    engine = ScriptedVllm()
    engine.vllm_config.weight_transfer_config.backend = "nccl"
    async with await server(engine, development=True) as client:
        answer = await client.post(path, json={})
    assert (answer.status_code, answer.json()) == (200, {"stock": path})
    assert engine.calls == []


async def test_an_error_of_vllms_own_is_passed_on() -> None:
    engine = ScriptedVllm()
    async with await server(engine, development=True) as client:
        answer = await client.post("/start_weight_update", json={"fail": True})
    assert (answer.status_code, answer.json()) == (500, {"stock": "failed"})


async def test_ready_says_whether_requests_are_served() -> None:
    engine = ScriptedVllm()
    async with await server(engine, development=False) as client:
        assert (await client.get("/ready")).json() == {"status": "ready", "weight_version": "default"}
        engine.workers[0].dirty = True
        answer = await client.get("/ready")
    assert answer.status_code == 503
    assert "of no version" in answer.json()["error"]["message"]


STRANGE = [
    {"x-forwarded-for": "203.0.113.9"}, {"forwarded": "for=127.0.0.1"}, {"x-real-ip": "127.0.0.1"}, {"via": "1.1 proxy"},
    {"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "http://127.0.0.1:1"}, {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize("headers", STRANGE, ids=lambda headers: " ".join(headers))
async def test_without_a_token_proxies_and_pages_of_other_sites_get_nowhere(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.delenv("WEIGHTCAST_TOKEN", raising=False)
    engine = ScriptedVllm()
    async with await server(engine, development=True) as client:
        for path in ("init", "commit", "rollback", "shutdown", "digests"):
            answer = await client.post(f"/weightcast/{path}", content=b"{}", headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError"), path
        for path in ("/weightcast/status", "/weightcast/rounds", "/weightcast", "/weightcast/metrics", "/ready"):
            assert (await client.get(path, headers=headers)).status_code == 401, path
        for path in (*TOLD, "/finish_weight_update"):
            assert (await client.post(path, json={}, headers=headers)).status_code == 401, path
        assert (await client.get("/weightcast/status")).status_code == 200
    monkeypatch.setenv("WEIGHTCAST_TOKEN", "t0ken")
    async with await server(engine, development=True) as client:
        assert (await client.get("/weightcast/status", headers=headers)).status_code == 200
        assert (
            await client.post("/weightcast/shutdown", headers={**headers, "x-weightcast-token": "t0ken"})
        ).status_code == 200


async def test_a_token_that_no_header_carries_ends_the_server_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCAST_TOKEN", "s3cret token")
    with pytest.raises(InvalidInput, match="WEIGHTCAST_TOKEN must be") as caught:
        await server(ScriptedVllm(), development=False)
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("WEIGHTCAST_TOKEN", "s3cret\n")
    async with await server(ScriptedVllm(), development=False) as client:
        assert (
            await client.post("/weightcast/shutdown", headers={"authorization": "Bearer s3cret"})
        ).status_code == 200
