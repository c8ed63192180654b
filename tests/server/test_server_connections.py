"""Connections of strangers: silent, half-sent, unread, and too many. Played with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from serve_process import START, serving

from weightcast.server import ServerConfig, create_app
from weightcast.server.connections import Connections, Limits
from weightcast.server.run import bind, server_config, url_of
from weightcast.testing.models import build_tiny_model
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.untrusted.seldom import SeldomFilter

WAIT_S = 30.0
IMPATIENT = f"""from functools import partial
from weightcast.server import run
run.Limits = partial(run.Limits, head_s=3.0, body_s=3.0)
{START}"""
"""The code of a server that gives strangers three seconds for a head and for a body."""
QUICK = Limits(connections=24, head_s=0.5, body_s=0.5, body_nbytes_s=1e6, unread_s=0.5)


@contextlib.contextmanager
def served(limits: Limits, engine: ScriptedEngine) -> Iterator[str]:
    """A server of this process on a thread of its own."""
    sock = bind("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # what nobody reads fills it soon
    config = server_config(create_app(engine, ServerConfig()), Connections(limits))
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield url_of(sock)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def address_of(url: str) -> tuple[str, int]:
    parts = httpx.URL(url)
    return parts.host, parts.port or 80


@contextlib.contextmanager
def connections(url: str, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.create_connection(address_of(url), timeout=WAIT_S)))
            if sent:
                with contextlib.suppress(OSError):
                    made[-1].sendall(sent)
        yield made


def ending(connection: socket.socket) -> bytes:
    """What comes until the server closes; the test fails by its time-out where that never happens."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /heal",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n{",
        b"POST /weightcast/init HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["silent", "half a line", "half a head", "half a body", "half a chunk"],
)
def test_a_connection_that_stops_sending_is_ended(sent: bytes) -> None:
    with served(QUICK, ScriptedEngine()) as url, connections(url, 3, sent) as made:
        for connection in made:
            ending(connection)
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_head_that_comes_drop_by_drop_is_ended() -> None:
    with (
        served(QUICK, ScriptedEngine()) as url,
        connections(url, 1, b"GET / HTTP/1.1\r\n") as (connection,),
        contextlib.suppress(OSError),
    ):
        for _ in range(500):
            connection.sendall(b"X")
            time.sleep(0.05)
        raise AssertionError("25 s of drops were taken")


def test_a_kept_connection_is_used_again_and_may_be_idle_between_requests() -> None:
    with served(QUICK, ScriptedEngine()) as url, httpx.Client() as client:
        assert client.get(f"{url}/health").status_code == 200
        time.sleep(3 * QUICK.head_s)
        (before,) = client._transport._pool.connections  # type: ignore[attr-defined]
        assert client.get(f"{url}/health").status_code == 200
        assert client._transport._pool.connections == [before]  # type: ignore[attr-defined]


def test_a_slow_body_that_goes_on_is_taken() -> None:
    limits = Limits(connections=24, head_s=5, body_s=1.0, body_nbytes_s=250)
    body = json.dumps({"prompt": "x" * 4000, "max_tokens": 1}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 500):
            time.sleep(0.2)
            yield body[start : start + 500]

    with served(limits, ScriptedEngine(max_model_len=8192)) as url:
        answer = httpx.post(f"{url}/v1/completions", content=pieces(), timeout=WAIT_S)
        assert answer.status_code in (200, 422), "the whole body was read"


def test_an_answer_that_nobody_reads_is_ended() -> None:
    engine = ScriptedEngine(max_model_len=1 << 20)
    body = json.dumps({"prompt": "x", "max_tokens": 200_000, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with served(QUICK, engine) as url, connections(url, 1, head + body) as (connection,):
        wait_for(lambda: engine_is_busy(engine))
        wait_for(lambda: not engine_is_busy(engine))
        ended = ending(connection)
    assert not ended.endswith(b"0\r\n\r\n"), "the answer was broken off"


def engine_is_busy(engine: ScriptedEngine) -> bool:
    return asyncio.run(engine.status()).num_running > 0


def test_waiting_connections_give_way_and_requests_beyond_their_share_are_refused() -> None:
    limits = Limits(connections=24, head_s=60)
    engine = ScriptedEngine(max_model_len=1 << 20)
    engine.token_delay_s = 0.05
    body = json.dumps({"prompt": "x", "max_tokens": 100_000, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
    with served(limits, engine) as url, connections(url, 100, b""):
        assert httpx.get(f"{url}/health", timeout=WAIT_S).status_code == 200
        with connections(url, limits.requests, head + body) as streams:
            for stream in streams:
                assert stream.recv(12) == b"HTTP/1.1 200"
            refused = httpx.get(f"{url}/weight_info", timeout=WAIT_S)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "TooManyRequests")
            assert refused.headers["retry-after"] == "1"
            assert httpx.get(f"{url}/health", timeout=WAIT_S).status_code == 200
        wait_for(lambda: httpx.get(f"{url}/weight_info", timeout=WAIT_S).status_code == 200)


def test_a_repeated_warning_is_logged_once_a_minute() -> None:
    seldom = SeldomFilter(logging.getLogger("uvicorn.error"))
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, "Invalid HTTP request received.", None, None)
    assert [seldom.filter(record) for _ in range(5)] == [True, False, False, False, False]


@pytest.mark.timeout(300)
def test_a_process_with_few_descriptors_is_healthy_among_400_strangers(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", "llama", "float32")
    halves = [
        b"",
        b"GET /health HTTP/1.1\r\nHost: 127",
        b"POST /pause HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{",
    ]
    with serving(model, tmp_path, start=IMPATIENT, descriptors=256) as server, contextlib.ExitStack() as stack:
        strangers = []
        for number in range(400):
            strangers += stack.enter_context(connections(server.url, 1, halves[number % len(halves)]))
            if number % 50 == 49:
                assert httpx.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(address_of(server.url), timeout=WAIT_S) as noise,
            ):
                noise.sendall(b"\x16\x03\x01 no http at all\r\n\r\n")
        assert httpx.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
        for stranger in strangers:
            ending(stranger)
        status, output = server.stop(signal.SIGTERM)
    assert status == 0, output
    assert len(output) < 20_000, output[:5000]
