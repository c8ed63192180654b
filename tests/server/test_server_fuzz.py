"""Whatever comes in, the server answers with an error of its own shape and lives; never 5xx."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_helpers import client_for

from weightcast.server.rl_schemas import UpdateBody
from weightcast.server.schemas import ChatRequest, CompletionRequest
from weightcast.testing.scripted_engine import ScriptedEngine

ROUTES = [
    "/v1/completions",
    "/v1/chat/completions",
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_checker",
    "/pause",
    "/resume",
    "/abort_requests",
    "/reset_prefix_cache",
    "/shutdown_weight_transfer_engine",
    "/weightcast/init",
    "/weightcast/commit",
    "/weightcast/rollback",
    "/weightcast/shutdown",
]
TEXT8 = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT8,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT8, inner, max_size=3),
    max_leaves=6,
)
# Numbers of outputs and tokens stay small: valid requests are carried out, and this is about the invalid ones.
SMALL = st.integers(-3, 9)
NAMES = sorted(
    {field.name for cls in (CompletionRequest, ChatRequest, UpdateBody) for field in msgspec.structs.fields(cls)}
    - {"stop_token_ids", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "min_tokens"}
)
BODIES = st.fixed_dictionaries(
    {"max_tokens": SMALL},
    optional={
        "prompt": st.text(max_size=5) | st.lists(SMALL | st.text(max_size=3) | st.lists(SMALL, max_size=3), max_size=3),
        "messages": st.lists(
            st.fixed_dictionaries(
                {}, optional={"role": st.sampled_from(["user", "system", "x"]) | JSON, "content": TEXT8 | JSON}
            ),
            max_size=3,
        ),
        "n": SMALL,
        "min_tokens": SMALL,
        "stop_token_ids": JSON,
        **dict.fromkeys(("epoch", "round", "version", "init_info", "new_version", "action", "mode"), JSON),
    },
).flatmap(
    lambda fixed: st.dictionaries(st.sampled_from(NAMES), JSON | SMALL, max_size=3).map(lambda more: more | fixed)
)
QUERIES = st.dictionaries(
    st.sampled_from(["mode", "clear_cache", "timeout_s", "reset_external", "checksums"]),
    st.text(max_size=6),
    max_size=2,
)
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Server:
    """One application that has to survive all requests of a test."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self.engine = ScriptedEngine(max_model_len=64)
        self.http = client_for(self.engine)

    def ask(self, path: str, content: bytes, params: dict[str, str] | None = None) -> None:
        """The answer must be a success or an error body, and the next good request must be served."""
        self._runner.run(self._ask(path, content, params))

    async def _ask(self, path: str, content: bytes, params: dict[str, str] | None) -> None:
        answer = await asyncio.wait_for(self.http.post(path, content=content, params=params), 20)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["code"] == answer.status_code
            assert error["message"]
            assert answer.status_code != 422 or isinstance(error["param"], str) or error["type"] == "Unsupported"
        await self.engine.resume_generation()
        alive = await self.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert alive.status_code == 200


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with asyncio.Runner() as runner:
        server = Server(runner)
        yield server
        runner.run(server.http.aclose())


@pytest.mark.parametrize("path", ROUTES)
@FUZZ
@given(body=BODIES | JSON, params=QUERIES)
def test_json(server: Server, path: str, body: Any, params: dict[str, str]) -> None:
    server.ask(path, msgspec.json.encode(body), params)


@pytest.mark.parametrize("path", ROUTES)
@settings(FUZZ, max_examples=20)
@given(content=st.binary(max_size=200))
def test_bytes(server: Server, path: str, content: bytes) -> None:
    server.ask(path, content)
