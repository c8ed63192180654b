"""weightcast's control routes: commit and roll-back over the weight-transfer contract, and mounting them elsewhere."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import Any

import httpx
import pytest
from server_helpers import BASE_URL, client_for
from starlette.applications import Starlette

from weightcast.errors import DigestMismatch, EngineError, ErrorForm, PlanMismatch
from weightcast.server import EngineCommitter, ServerConfig, TokenAuth, control_router
from weightcast.testing.scripted_engine import ScriptedEngine

INIT = {"init_info": {"address": "tcp://127.0.0.1:1"}}
WEIGHT_CALLS = {
    "pause_generation",
    "resume_generation",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_prefix_cache",
}


def order(**fields: Any) -> dict[str, Any]:
    return {"epoch": 1, "round": random.getrandbits(40), "version": f"n-{secrets.token_hex(6)}", **fields}


async def post(http: httpx.AsyncClient, path: str, body: Any, status: int = 200, **headers: str) -> Any:
    answer = await http.post(f"/weightcast/{path}", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()


def steps(engine: ScriptedEngine) -> list[str]:
    return [name for name, _ in engine.calls if name in WEIGHT_CALLS]


async def test_commit(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    body = order(pause="keep", clear_cache=False, timeout_s=5.0)
    answer = await post(http, "commit", body)
    assert answer["version"] == body["version"] == engine.version
    assert set(answer["phases"]) == {"pause", "apply", "resume"}
    assert all(seconds >= 0 for seconds in answer["phases"].values())
    assert engine.named("pause_generation") == [{"mode": "keep", "clear_cache": False}]
    told = {"action": "commit", "epoch": 1, "round": body["round"], "version": body["version"]}
    (update,) = engine.named("update_weights")
    assert 0 < update.pop("timeout_s") <= 60, "the engine waits no longer than whoever ordered the commit"
    assert update == told
    assert steps(engine) == [
        "pause_generation", "start_weight_update", "update_weights", "finish_weight_update", "resume_generation",
    ]  # fmt: skip
    assert not await engine.is_paused()


async def test_a_paused_engine_stays_paused(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    await engine.pause_generation("keep")
    await post(http, "commit", order())
    assert await engine.is_paused()
    assert engine.named("resume_generation") == []


async def test_without_a_pause(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    await post(http, "commit", order(pause="none", clear_cache=False))
    assert steps(engine) == ["start_weight_update", "update_weights", "finish_weight_update"]
    await post(http, "commit", order(pause="none", clear_cache=True))
    assert engine.named("pause_generation") == [{"mode": "keep", "clear_cache": True}], (
        "no step between change and cleaning"
    )


async def test_rollback(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    answer = await post(http, "rollback", {"epoch": 3, "round": 9, "timeout_s": 5})
    (update,) = engine.named("update_weights")
    assert 0 < update.pop("timeout_s") <= 5
    assert update == {"action": "rollback", "epoch": 3, "round": 9}
    assert answer["version"] == engine.version


async def test_a_repeated_commit_changes_nothing(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    body = order()
    first = await post(http, "commit", body)
    assert await post(http, "commit", {**body, "timeout_s": 3.0}) == first
    assert len(engine.named("update_weights")) == 1
    await post(http, "rollback", {"epoch": body["epoch"], "round": body["round"]})
    await post(http, "commit", body)
    assert len(engine.named("update_weights")) == 3


async def test_before_init_is_409_and_nothing_stays_behind(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    error = await post(http, "commit", order(), status=409)
    assert error["error"]["type"] == "StateError"
    assert not await engine.is_paused()
    await post(http, "init", INIT)
    await post(http, "commit", order())


@pytest.mark.parametrize("method", ["start_weight_update", "update_weights", "finish_weight_update"])
@pytest.mark.parametrize(
    ("failure", "status"),
    [(DigestMismatch("bytes differ"), 424), (PlanMismatch("other model"), 409), (EngineError("gone"), 424), (KeyError("bug"), 424)],
)  # fmt: skip
async def test_after_a_failure_the_next_commit_works(
    http: httpx.AsyncClient, engine: ScriptedEngine, method: str, failure: Exception, status: int
) -> None:
    await post(http, "init", INIT)
    engine.fail(method, failure)
    error = (await post(http, "commit", order(), status=status))["error"]
    if not isinstance(failure, KeyError):
        assert type(ErrorForm(kind=error["type"], message=error["message"]).error()) is type(failure)
    assert not await engine.is_paused()
    body = order()
    assert (await post(http, "commit", body))["version"] == body["version"] == engine.version


async def test_pause_past_the_deadline_changes_nothing(engine: ScriptedEngine) -> None:
    engine.token_delay_s = 0.02
    async with client_for(engine) as http:
        await post(http, "init", INIT)
        task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 30}))
        while not engine.named("generate"):
            await asyncio.sleep(0.01)
        error = await post(http, "commit", order(pause="wait", timeout_s=0.1), status=424)
        assert error["error"]["type"] == "DeadlineExceeded"
        assert (await asyncio.wait_for(task, 10)).json()["choices"][0]["finish_reason"] == "length"
        assert engine.named("start_weight_update") == []
        assert not await engine.is_paused()


async def test_a_commit_past_its_deadline_still_ends(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.update_weights

    async def slow(info: Any) -> None:
        await asyncio.sleep(0.3)
        await original(info)

    monkeypatch.setattr(engine, "update_weights", slow)
    async with client_for(engine) as http:
        await post(http, "init", INIT)
        body = order(timeout_s=0.1)
        assert (await post(http, "commit", body, status=424))["error"]["type"] == "DeadlineExceeded"
        # The same order again waits for the first one and learns its outcome.
        assert (await post(http, "commit", {**body, "timeout_s": 5.0}))["version"] == body["version"]
    assert len(engine.named("update_weights")) == 1
    assert not await engine.is_paused()


async def test_commits_take_turns(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, "init", INIT)
    bodies = [order() for _ in range(5)]
    await asyncio.gather(*(post(http, "commit", body) for body in bodies))
    assert len(engine.named("update_weights")) == 5
    assert [name for name in steps(engine) if "pause" in name or "resume" in name] == [
        "pause_generation",
        "resume_generation",
    ] * 5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"epoch": -1}, "epoch"),
        ({"round": "one"}, "round"),
        ({"round": 1 << 63}, "round"),
        ({"version": ""}, "version"),
        ({"version": None}, "version"),
        ({"pause": "sometimes"}, "pause"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 1e300}, "timeout_s"),
        ({"clear_cache": "yes"}, "clear_cache"),
        ({"extra": 1}, "extra"),
    ],
)
async def test_bad_orders(http: httpx.AsyncClient, engine: ScriptedEngine, change: dict[str, Any], field: str) -> None:
    await post(http, "init", INIT)
    error = await post(http, "commit", order(**change), status=422)
    assert error["error"]["param"] == field
    assert steps(engine) == []


async def test_status_and_details(engine: ScriptedEngine) -> None:
    token = secrets.token_urlsafe(12)
    async with client_for(engine, ServerConfig(token=token), client="192.0.2.7") as http:
        bearer = {"authorization": f"Bearer {token}"}
        body = order()
        await post(http, "init", INIT, **bearer)
        await post(http, "commit", body, **bearer)
        public = (await http.get("/weightcast/status")).json()
        assert public["weight_version"] == body["version"]
        assert "details" not in public
        assert (await http.get("/weightcast/status", params={"checksums": "true"})).status_code == 401
        private = (await http.get("/weightcast/status", params={"checksums": "true"}, headers=bearer)).json()
        assert private["details"]["checksums"] == await engine.checksums()
        assert private["details"]["last_order"]["round"] == body["round"]


async def test_mounted_into_another_application(engine: ScriptedEngine) -> None:
    token = secrets.token_urlsafe(12)
    app = Starlette()
    app.router.routes.extend(control_router(EngineCommitter(engine), TokenAuth(token)).routes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=BASE_URL) as http:
        await post(http, "init", INIT, status=401)
        await post(http, "init", INIT, authorization=f"Bearer {token}")
        body = order()
        assert (await post(http, "commit", body, authorization=f"Bearer {token}"))["version"] == body["version"]
        assert (await post(http, "commit", order(round=-1), 422, authorization=f"Bearer {token}"))["error"][
            "param"
        ] == "round"


async def test_the_latest_rounds_are_open_and_name_errors_without_quoting_them(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(token="secret")) as http:
        bearer = {"authorization": "Bearer secret"}
        await post(http, "init", INIT, **bearer)
        good, bad = order(), order()
        await post(http, "commit", good, **bearer)
        engine.fail("update_weights", DigestMismatch("live weights have digest 00aa"))
        await post(http, "commit", bad, 424, **bearer)
        answer = await http.get("/weightcast/rounds")
        assert answer.status_code == 200
        (told,) = answer.json()["engines"]
        first, second = told["rounds"]
        assert (first["version"], first["round"], first["error"]) == (good["version"], good["round"], None)
        assert [phase["name"] for phase in first["phases"]] == ["pause", "apply", "resume"]
        assert (second["round"], second["error"]) == (bad["round"], "DigestMismatch")
        assert "00aa" not in answer.text
        assert told["status"]["weight_version"] == good["version"]
        page = await http.get("/weightcast")
        assert page.headers["content-type"].startswith("text/html")
        assert good["version"] not in page.text
