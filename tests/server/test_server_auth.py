"""Who may call what."""

from __future__ import annotations

import secrets

import httpx
import pytest
from server_helpers import client_for

from weightcast.errors import InvalidInput
from weightcast.server import ServerConfig
from weightcast.server.auth import check_host, is_loopback
from weightcast.testing.scripted_engine import ScriptedEngine

GUARDED = [
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/shutdown_weight_transfer_engine",
    "/update_weight_version",
    "/weight_checker",
    "/pause",
    "/resume",
    "/abort_requests",
    "/reset_prefix_cache",
    "/collective_rpc",
    "/v1/load_lora_adapter",
    "/weightcast/init",
    "/weightcast/commit",
    "/weightcast/rollback",
    "/weightcast/shutdown",
]
OPEN = [
    "/health",
    "/metrics",
    "/v1/models",
    "/server_info",
    "/is_paused",
    "/get_world_size",
    "/weight_info",
    "/openapi.json",
]


@pytest.mark.parametrize("path", GUARDED)
async def test_guarded_routes(engine: ScriptedEngine, path: str) -> None:
    token = secrets.token_urlsafe(16)
    wrong = [{}, {"authorization": f"Bearer {token}x"}, {"authorization": token}, {"authorization": "Bearer "},
             {"authorization": "Basic dTpw"}, {"x-weightcast-token": token[:-1]}, {"x-weightcast-token": "\xe9"}]  # fmt: skip
    async with client_for(engine, ServerConfig(token=token)) as http:
        for headers in wrong:
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await http.post(path, headers=encoded)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.text
        assert engine.calls == []
        for headers in ({"authorization": f"bearer {token}"}, {"x-weightcast-token": token}):
            assert (await http.post(path, headers=headers)).status_code != 401


@pytest.mark.parametrize("path", OPEN)
async def test_open_routes(engine: ScriptedEngine, path: str) -> None:
    async with client_for(engine, ServerConfig(token="t0ken"), client="203.0.113.5") as http:
        assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("client", "headers", "allowed"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {"host": "[::1]:8000"}, True),
        ("127.0.0.1", {"origin": "http://localhost:3000"}, True),
        ("192.0.2.1", {}, False),
        ("127.0.0.1", {"host": "rebound.example:8000"}, False),
        ("127.0.0.1", {"origin": "https://evil.example"}, False),
        ("127.0.0.1", {"origin": "null"}, False),
    ],
)
async def test_without_a_token_only_this_machine(
    engine: ScriptedEngine, client: str, headers: dict[str, str], allowed: bool
) -> None:
    async with client_for(engine, client=client) as http:
        answer = await http.post("/pause", headers=headers)
    assert answer.status_code == (200 if allowed else 401)
    assert await engine.is_paused() is allowed


async def test_api_key(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(api_key="k3y", token="t0ken")) as http:
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert (await http.post(path, json={"prompt": "x"})).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": "Bearer k3y"})).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/pause", headers={"authorization": "Bearer k3y"})).status_code == 401


async def test_errors_of_the_router_have_the_same_shape(http: httpx.AsyncClient) -> None:
    missing, method = await http.get("/nothing"), await http.get("/pause")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFound")
    assert (method.status_code, method.json()["error"]["type"]) == (405, "MethodNotAllowed")
    assert "POST" in method.headers["allow"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"]
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check_host(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.4", "localhost.evil.example", "127.0.0.1.nip.io", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
    check_host(host, "t0ken")
    with pytest.raises(InvalidInput, match="WEIGHTCAST_TOKEN") as caught:
        check_host(host, None)
    assert caught.value.field == "host"


@pytest.mark.parametrize("value", ["", "  ", "t\xf6ken"])
def test_unusable_tokens(value: str) -> None:
    with pytest.raises(InvalidInput, match="token"):
        ServerConfig(token=value)
