"""Who may call what."""

from __future__ import annotations

import secrets
from base64 import b64encode

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
    "/ready",
    "/metrics",
    "/v1/models",
    "/server_info",
    "/is_paused",
    "/get_world_size",
    "/weight_info",
    "/openapi.json",
]


def basic(password: str, user: str = "somebody") -> str:
    return b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("path", GUARDED)
async def test_guarded_routes(engine: ScriptedEngine, path: str) -> None:
    token = secrets.token_urlsafe(16)
    wrong = [{}, {"authorization": f"Bearer {token}x"}, {"authorization": token}, {"authorization": "Bearer "},
             {"authorization": "Basic dTpw"}, {"authorization": "Basic !"}, {"authorization": f"Basic {basic(token[:-1])}"},
             {"authorization": f"Basic {b64encode(token.encode()).decode()}"}, {"x-weightcast-token": token[:-1]}, {"x-weightcast-token": "\xe9"}]  # fmt: skip
    async with client_for(engine, ServerConfig(token=token)) as http:
        for headers in wrong:
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await http.post(path, headers=encoded)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.text
        assert engine.calls == []
        for headers in (
            {"authorization": f"bearer {token}"},
            {"x-weightcast-token": token},
            {"authorization": f"Basic {basic(token)}"},
            {"authorization": f"basic {basic(token, user='')}"},
            {"authorization": "Basic dTpw", "x-weightcast-token": token},
        ):
            assert (await http.post(path, headers=headers)).status_code != 401


@pytest.mark.parametrize("path", OPEN)
async def test_open_routes(engine: ScriptedEngine, path: str) -> None:
    async with client_for(engine, ServerConfig(token="t0ken"), client="203.0.113.5") as http:
        assert (await http.get(path)).status_code == 200


async def test_a_password_that_a_browser_sends_along_for_another_page_does_not_count(engine: ScriptedEngine) -> None:
    token = secrets.token_urlsafe(16)
    known = {"authorization": f"Basic {basic(token)}"}
    async with client_for(engine, ServerConfig(token=token)) as http:
        for more in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert (await http.post("/pause", headers={**known, **more})).status_code == 401
        assert not await engine.is_paused()
        assert (await http.post("/pause", headers={**known, "sec-fetch-site": "same-origin"})).status_code == 200


LOCAL = {"host": "127.0.0.1:8000"}
STRANGE = [
    ("127.0.0.1", {"host": "rebound.example:8000"}),
    ("127.0.0.1", {"host": "127.0.0.1.nip.io"}),
    ("127.0.0.1", {"host": "127.0.0.1:99999"}),
    ("127.0.0.1", {"host": "rebound.example@127.0.0.1:8000"}),
    ("127.0.0.1", {"host": "127.0.0.1:8000/rebound.example"}),
    ("127.0.0.1", {"host": "127.0.0.1:8000#rebound.example"}),
    ("127.0.0.1", {**LOCAL, "origin": "https://evil.example"}),
    ("127.0.0.1", {**LOCAL, "origin": "http://127.0.0.1:3000"}),
    ("127.0.0.1", {**LOCAL, "origin": "http://localhost:8000"}),
    ("127.0.0.1", {**LOCAL, "origin": "null"}),
    ("127.0.0.1", {**LOCAL, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}),
    ("127.0.0.1", {**LOCAL, "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}),
    ("127.0.0.1", {**LOCAL, "x-forwarded-for": "203.0.113.9"}),
    ("127.0.0.1", {**LOCAL, "x-forwarded-host": "models.example"}),
    ("127.0.0.1", {**LOCAL, "forwarded": "for=203.0.113.9"}),
    ("127.0.0.1", {**LOCAL, "x-real-ip": "127.0.0.1"}),
    ("127.0.0.1", {**LOCAL, "via": "1.1 proxy"}),
    ("::ffff:127.0.0.1", {**LOCAL, "via": "1.1 proxy"}),
    ("203.0.113.9", {**LOCAL, "x-forwarded-for": "203.0.113.9"}),  # the address that uvicorn takes from the header
]  # fmt: skip
OURS = [
    ("127.0.0.1", {}),
    ("127.0.0.1", LOCAL),
    ("127.0.0.1", {"host": "localhost:8000", "origin": "http://localhost:8000"}),
    ("127.0.0.1", {"host": "localhost", "origin": "http://localhost"}),
    ("::1", {"host": "[::1]:8000", "origin": "http://[::1]:8000"}),
    ("127.0.0.1", {**LOCAL, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}),
]
ALL_OPEN = [("GET", path) for path in OPEN if path != "/health"] + [
    ("GET", "/health"), ("GET", "/weightcast"), ("GET", "/weightcast/status"), ("GET", "/weightcast/rounds"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("client", "headers"), [*STRANGE, ("192.0.2.1", {})])
async def test_without_a_token_only_this_machine_changes_weights(
    engine: ScriptedEngine, client: str, headers: dict[str, str]
) -> None:
    async with client_for(engine, client=client) as http:
        answer = await http.post("/pause", headers=headers)
    assert answer.status_code == 401
    assert not await engine.is_paused()


@pytest.mark.parametrize(("client", "headers"), STRANGE)
async def test_without_a_token_open_routes_answer_no_page_of_another_site_and_no_proxy(
    engine: ScriptedEngine, client: str, headers: dict[str, str]
) -> None:
    async with client_for(engine, client=client) as http:
        for method, path in ALL_OPEN:
            body = b'{"prompt": "x", "max_tokens": 1, "messages": []}' if method == "POST" else None
            answer = await http.request(method, path, headers={**headers, "content-type": "text/plain"}, content=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError"), (path, headers)
    async with client_for(engine, ServerConfig(token="t0ken"), client=client) as http:
        assert (await http.get("/weight_info", headers=headers)).status_code == 200, (
            "a server with a token is for others"
        )


@pytest.mark.parametrize(("client", "headers"), OURS)
async def test_without_a_token_this_machine_is_answered(
    engine: ScriptedEngine, client: str, headers: dict[str, str]
) -> None:
    async with client_for(engine, client=client) as http:
        assert (await http.get("/weight_info", headers=headers)).status_code == 200
        assert (await http.post("/pause", headers=headers)).status_code == 200
        followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        page = await http.get("/weightcast", headers={**headers, **followed})
        assert page.status_code == 200
        assert page.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        framed = await http.get("/weightcast", headers={**headers, **followed, "sec-fetch-dest": "iframe"})
        assert framed.status_code == 401
    assert await engine.is_paused()


async def test_who_gives_no_token_hears_where_one_is_given(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(token=secrets.token_urlsafe(16))) as http:
        text = (await http.post("/weightcast/init")).text
    assert all(
        way in text for way in ("Authorization: Bearer", "Publisher(token=...)", "--token-file", "WEIGHTCAST_TOKEN")
    )


async def test_api_key(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(api_key="k3y", token="t0ken")) as http:
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert (await http.post(path, json={"prompt": "x"})).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/v1/models", headers={"authorization": "Bearer k3y"})).status_code == 200
        assert (await http.get("/health")).status_code == 200
        assert (await http.post("/pause", headers={"authorization": "Bearer k3y"})).status_code == 401


async def test_a_path_with_a_slash_too_many_is_answered_without_a_word_of_its_host(http: httpx.AsyncClient) -> None:
    answer = await http.get("/health/", headers={"host": "evil.example"})
    assert answer.status_code == 404
    assert "evil.example" not in answer.text + str(answer.headers)


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


@pytest.mark.parametrize("field", ["token", "api_key"])
@pytest.mark.parametrize(
    "value", ["", "  ", "t\xf6kenvalue", "token value", "tokenvalue\x00", "tokenvalue\r\nX: 1", "v" * 5000]
)
def test_unusable_tokens_are_refused_without_their_value(value: str, field: str) -> None:
    with pytest.raises(InvalidInput, match=field) as caught:
        ServerConfig(**{field: value})
    assert caught.value.field == field
    assert "value" not in str(caught.value).replace(field, "")


async def test_a_token_that_was_read_with_its_newline_is_taken_without_it(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(token=" t0ken\r\n")) as http:
        assert (await http.post("/pause", headers={"authorization": "Bearer t0ken"})).status_code == 200


async def test_refusals_that_anybody_can_cause_are_logged_once_a_minute(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_for(engine, ServerConfig(token="t0ken")) as http:
        for _ in range(50):
            assert (await http.post("/pause", headers={"authorization": "Bearer guess"})).status_code == 401
            assert (await http.post("/v1/completions", content=b"{")).status_code == 422
            assert (await http.post("/weightcast/commit", headers={"authorization": "Bearer t0ken"})).status_code == 422
    lines = [record.getMessage() for record in caplog.records]
    assert sum("/pause: 401" in line for line in lines) == 1
    assert sum("/v1/completions: 422" in line for line in lines) == 1


async def test_refusals_of_a_trainer_are_all_logged(engine: ScriptedEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with client_for(engine, ServerConfig(token="t0ken")) as http:
        for _ in range(3):
            assert (await http.post("/weightcast/commit", headers={"authorization": "Bearer t0ken"})).status_code == 422
    assert sum("/weightcast/commit: 422" in record.getMessage() for record in caplog.records) == 3
