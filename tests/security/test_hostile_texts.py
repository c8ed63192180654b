"""A hostile engine's texts in a terminal and a log: no escape sequence, no forged line, no flood."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from weightcast import Publisher
from weightcast.cli import app
from weightcast.control import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import ProtocolError, WeightcastError
from weightcast.messages import PROTOCOL, decode
from weightcast.testing.local_engine import DictModel, LocalEngine

EVIL = "ok\x1b[2J\x1b]0;pwned\x07\r\nCRITICAL forged: all is lost\x9b1m\u202e"
LONG = EVIL + "x" * 100_000


@pytest.fixture
def hostile() -> Iterator[Callable[[int, Any], str]]:
    """Start a server that answers all requests with one status and JSON body; its URL."""
    started = []

    def start(status: int, body: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = json.dumps(body).encode()
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, format: str, *arguments: Any) -> None:
                return

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def is_harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n")) and len(text) < 20_000


ERROR = {"kind": LONG, "message": LONG, "hint": LONG, "phase": LONG, "engine": LONG, "trace": LONG * 3}
ANSWERS = [
    (200, {"weight_version": LONG, "dirty": False, "ready": False, "reason": LONG, "model": LONG, "digest": LONG,
           "num_running": LONG, "world_size": 1, "tensors": {LONG: {"reason": LONG}}}),
    (409, {"error": {"type": LONG, "message": LONG, "detail": ERROR}}),
    (409, {"error": {"type": "StateError", "message": LONG, "detail": {**ERROR, LONG: 1}}}),
    (500, LONG),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body"), ANSWERS, ids=["good", "error", "error with more", "text"])
def test_commands_print_a_hostile_servers_texts_harmlessly(
    hostile: Callable[[int, Any], str], tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, body: Any
) -> None:
    url = hostile(status, body)
    save_file({"w": torch.rand(3)}, tmp_path / "model.safetensors")
    for arguments in (
        ["status", url],
        ["push", str(tmp_path), "--to", url, "--timeout", "5"],
        ["verify", url, "--checkpoint", str(tmp_path), "--timeout", "5"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1 or arguments[0] == "status", result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert is_harmless(result.output), result.output[:500]
    assert is_harmless(caplog.text)


def test_a_worker_whose_error_is_hostile_is_named_harmlessly(caplog: pytest.LogCaptureFixture) -> None:
    engine = LocalEngine("one", [DictModel({"w": torch.zeros(3)})])
    with Publisher({"w": torch.rand(3)}, [engine], timeout_s=10) as publisher:
        publisher.publish()

        def receive(*_: object) -> None:
            raise WeightcastError(LONG, hint=LONG)

        engine.workers[0].receiver._session.receive = receive  # type: ignore[union-attr, method-assign, assignment]
        with pytest.raises(WeightcastError) as caught:
            publisher.publish()
    assert "CRITICAL forged" in str(caught.value)
    assert is_harmless(str(caught.value))


def test_a_frame_of_megabytes_is_a_line_in_the_log() -> None:
    strange = {"type": "bye", "reason": "", LONG * 100: 1}
    for body in (strange, {"type": LONG * 100}, {"type": "bye", "reason": {LONG * 100: 1}}):
        with pytest.raises(ProtocolError) as caught:
            decode(bytes([PROTOCOL]) + msgspec.msgpack.encode(body))
        assert is_harmless(str(caught.value))
        assert len(str(caught.value)) < 1000


def test_a_hello_of_megabytes_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from weightcast.control import ControlLink, JoinInfo
    from weightcast.facts import Facts
    from weightcast.messages import Hello

    caplog.set_level(logging.INFO)
    coordinator = Coordinator()
    refused = threading.Event()
    info = JoinInfo(
        address=f"tcp://127.0.0.1:{coordinator.port}", public_key=coordinator.public_key, ticket=secrets.token_hex(8),
        engine=EVIL, timeout_s=10,
    )  # fmt: skip
    link = ControlLink(info, lambda message: refused.set(), lambda reason: None)
    try:
        facts = Facts(host=EVIL, pid=1, device=EVIL)
        link.send(
            Hello(
                ticket="guess",
                engine=LONG,
                rank=0,
                world_size=1,
                facts=facts,
                version=LONG,
                digest="",
                dirty=False,
                highest=0,
            )
        )
        assert refused.wait(Deadline(20).remaining_s())
    finally:
        link.close("done")
        coordinator.close()
    assert "refused a worker" in caplog.text
    assert is_harmless(caplog.text)
