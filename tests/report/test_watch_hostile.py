"""``weightcast watch`` beside servers that answer anything: the others are shown as before, and nothing hostile reaches the page."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from weightcast.cli.watch import HANDLER_TIMEOUT_S, WatchServer, _Handler
from weightcast.report.watched import MAX_ADAPTERS, MAX_ROUNDS
from weightcast.trainer.clients.wire import ANSWER_NBYTES

ROUND = {
    "at": 1.0,
    "action": "commit",
    "epoch": 1,
    "round": 2,
    "version": "3-ab",
    "seconds": 0.5,
    "phases": [{"name": "pause", "start_s": 0.0, "seconds": 0.1}],
}
STATUS = {"weight_version": "3-ab", "ready": True, "reason": "", "dirty": False, "paused": False, "model": "m"}
GOOD = {"engines": [{"name": "m", "status": STATUS, "rounds": [{**ROUND, "error": None}]}]}
HOSTILE_TEXT = "x\x1b[2J\u202e" * 10_000


def answer_of(engine: dict[str, Any]) -> bytes:
    return json.dumps({"engines": [engine]}).encode()


BAD = [
    b'{"engines": 7}', b"[]", b"7", b"null", b"", b"\xff\xfe", b'{"engines": []}', b'{"engines": {}}', b'{"engines": [7]}',
    b"[" * 100_000, b'{"engines": [' + b"[" * 100_000,
    answer_of({"name": 7}), answer_of({"status": 7}), answer_of({"rounds": 7}), answer_of({"rounds": [7]}),
    answer_of({"status": {"weight_version": 7, "ready": True}}), answer_of({"status": STATUS, "rounds": [{**ROUND, "phases": 7}]}),
    answer_of({"status": STATUS, "rounds": [{**ROUND, "phases": [{"name": "", "start_s": 0.0, "seconds": 0.1}]}]}),
    answer_of({"status": STATUS, "rounds": [{**ROUND, "phases": [{"name": "p", "start_s": -1.0, "seconds": 0.1}]}]}),
    answer_of({"status": STATUS, "rounds": [{**ROUND, "seconds": "long"}]}),
    answer_of({"status": STATUS, "rounds": [{**ROUND, "seconds": 1e300}]}),
    answer_of({"status": STATUS, "rounds": [{**ROUND, "at": -1}]}),
    json.dumps({"engines": [{"name": "e"}] * 100_000}).encode(),
]  # fmt: skip


class Server:
    """Answers /weightcast/rounds with ``body``."""

    def __init__(self) -> None:
        self.body = json.dumps(GOOD).encode()
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                for name, value in {"Content-Length": str(len(outer.body)), **outer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(outer.body)
                except OSError:
                    return  # whoever asked has heard enough

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def servers() -> Iterator[tuple[Server, Server]]:
    good, bad = Server(), Server()
    yield good, bad
    good.close()
    bad.close()


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_a_server_that_answers_anything_counts_as_not_reached(servers: tuple[Server, Server], body: bytes) -> None:
    good, bad = servers
    bad.body = body
    with WatchServer([bad.url, good.url]) as watching:
        first, second = watching.rounds()["engines"]
    assert (first["name"], first["status"], first["rounds"]) == (bad.url, None, [])
    assert first["error"].startswith("/weightcast/rounds did not answer with rounds: ")
    assert len(first["error"]) <= 2000
    assert first["error"].isprintable()
    assert (second["name"], second["status"]["weight_version"]) == (good.url, "3-ab")
    assert list(second["rounds"][0]["phases"]) == ROUND["phases"]


def test_texts_are_cleaned_and_lists_cut(servers: tuple[Server, Server]) -> None:
    _, bad = servers
    status = {**STATUS, "weight_version": HOSTILE_TEXT, "ready": False, "reason": HOSTILE_TEXT}
    row = {
        **ROUND,
        "version": HOSTILE_TEXT,
        "error": HOSTILE_TEXT,
        "phases": [{"name": HOSTILE_TEXT + str(i), "start_s": 0.0, "seconds": 0.1} for i in range(100)],
    }
    bad.body = json.dumps({"engines": [{"name": HOSTILE_TEXT, "status": status, "rounds": [row] * 20}] * 2}).encode()
    with WatchServer([bad.url]) as watching:
        text = json.dumps(watching.rounds(), ensure_ascii=False)
    assert text.isprintable()
    assert len(text) < 500_000
    adapters = {f"\x1b{i}": {"weight_version": HOSTILE_TEXT[:9]} for i in range(2 * MAX_ADAPTERS)}
    status = {**STATUS, "adapters": adapters}
    bad.body = json.dumps({"engines": [{"status": status, "rounds": [ROUND] * 5000}]}).encode()
    with WatchServer([bad.url]) as watching:
        (engine,) = watching.rounds()["engines"]
    assert len(engine["rounds"]) == MAX_ROUNDS
    assert len(engine["status"]["adapters"]) == MAX_ADAPTERS
    assert json.dumps(engine["status"], ensure_ascii=False).isprintable()


def test_a_compressed_answer_is_not_inflated_and_a_long_one_not_read(servers: tuple[Server, Server]) -> None:
    good, bad = servers
    bad.body = gzip.compress(b" " * 2**28 + json.dumps(GOOD).encode(), 9)
    bad.headers = {"Content-Encoding": "gzip"}
    with WatchServer([bad.url, good.url]) as watching:
        first, second = watching.rounds()["engines"]
        assert first["status"] is None
        assert second["status"] is not None
        bad.headers = {}
        bad.body = b" " * (ANSWER_NBYTES + 1) + json.dumps(GOOD).encode()
        first, second = watching.rounds()["engines"]
        assert first["status"] is None
        assert second["status"] is not None


@pytest.fixture
def page(servers: tuple[Server, Server]) -> Iterator[WatchServer]:
    with WatchServer([servers[0].url]) as watching:
        thread = threading.Thread(target=watching.serve_forever, args=(0.02,))
        thread.start()
        yield watching
        watching.shutdown()
        thread.join()


def test_the_page_is_for_this_machine_and_no_other_page(page: WatchServer) -> None:
    port = page.server_address[1]
    ours = {"Origin": f"http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"}
    for path in ("", "weightcast/rounds"):
        answer = httpx.get(page.url + path, headers=ours)
        assert answer.status_code == 200
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        for theirs in (
            {"Host": f"evil.example:{port}"},
            {"Origin": "https://evil.example"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        ):
            assert httpx.get(page.url + path, headers=theirs).status_code == 403, theirs


def test_a_silent_browser_is_left(page: WatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _Handler.timeout == HANDLER_TIMEOUT_S
    monkeypatch.setattr(_Handler, "timeout", 0.3)
    with socket.create_connection(page.server_address[:2], timeout=20) as silent:
        assert silent.recv(1) == b""
