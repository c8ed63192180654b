"""The served OpenAPI document, tried out by schemathesis: bad input never ends in a 5xx, answers are what the document says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from weightcast.server import ServerConfig, create_app
from weightcast.server.run import bind, url_of
from weightcast.testing.scripted_engine import ScriptedEngine

SECRETS = {"token": "a-token-for-tests", "api_key": "a-key-for-tests"}
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
TRIES = settings(
    max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    app = create_app(ScriptedEngine(max_model_len=64), ServerConfig(token=SECRETS["token"], api_key=SECRETS["api_key"]))
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, loop="asyncio"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield url_of(sock)
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture(scope="module")
def document(server_url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server_url}/openapi.json")


def operations(document: schemathesis.BaseSchema) -> Iterator[APIOperation[Any, Any, Any]]:
    """Every operation that the document describes; at least those that change weights are among them."""
    found = [result.ok() for result in document.get_all_operations()]
    assert {"/weightcast/commit", "/update_weights", "/v1/completions"} <= {operation.path for operation in found}
    return iter(found)


def guard_of(operation: APIOperation[Any, Any, Any]) -> str | None:
    """The name of the secret that an operation asks for."""
    security = operation.definition.raw.get("security")
    return next(iter(security[0])) if security else None


def run(tries: settings, operation: APIOperation[Any, Any, Any], check: Callable[[schemathesis.Case], None]) -> None:
    """Check cases of one operation."""

    @tries
    @given(case=operation.as_strategy())
    def examples(case: schemathesis.Case) -> None:
        check(case)

    examples()


def test_with_the_token(document: schemathesis.BaseSchema, server_url: str) -> None:
    resume = {"Authorization": f"Bearer {SECRETS['token']}"}
    with httpx.Client(base_url=server_url, headers=resume, timeout=20) as client:
        for operation in operations(document):
            guard = guard_of(operation)
            headers = {} if guard is None else {"Authorization": f"Bearer {SECRETS[guard]}"}

            def try_out(headers: dict[str, str], case: schemathesis.Case) -> None:
                case.call_and_validate(headers=headers, checks=CHECKS, timeout=20)
                client.post("/resume").raise_for_status()

            run(TRIES, operation, partial(try_out, headers))


def test_without_the_token_guarded_routes_are_shut(document: schemathesis.BaseSchema) -> None:
    for operation in operations(document):
        guard = guard_of(operation)
        if guard is None:
            continue
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"X-Weightcast-Token": SECRETS[guard] + "x"}]

        def try_out(wrong: list[dict[str, str]], case: schemathesis.Case) -> None:
            for headers in wrong:
                assert case.call(headers=headers, timeout=20).status_code == 401, case

        run(settings(TRIES, max_examples=2), operation, partial(try_out, wrong))
