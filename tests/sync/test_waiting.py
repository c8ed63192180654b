"""Servers that are not there yet are waited for, and what a publisher is doing is told while it does it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.support.engine_process import TOKEN, EngineProcess, values_of
from tests.support.ports import HeldPort

from weightcast import DeadlineExceeded, EngineError, PeerLost, Publisher, WeightcastError
from weightcast.trainer.progress import Step


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    with EngineProcess("staged") as made:
        assert isinstance(made, EngineProcess)
        yield made


def test_a_server_that_comes_later_is_waited_for_and_told_of(engine: EngineProcess) -> None:
    steps: list[Step] = []
    waiting = threading.Event()

    def note(step: Step) -> None:
        steps.append(step)
        if step.phase == "wait":
            waiting.set()
        raise RuntimeError("what a listener raises stops nothing")

    made: list[EngineProcess] = []

    def restart() -> None:
        waiting.wait(60)
        made.append(engine.successor())

    engine.kill()
    thread = threading.Thread(target=restart)
    thread.start()
    try:
        with Publisher(values_of(7), [engine.url], token=TOKEN, timeout_s=20, on_progress=note) as publisher:
            publisher.connect(wait_s=60)
            report = publisher.publish()
    finally:
        thread.join(60)
    (successor,) = made
    try:
        assert report.digests_match
        assert successor.call("holds", 7)
    finally:
        successor.close()
    phases = [step.phase for step in steps]
    wanted = [
        "wait",
        "connect",
        "join",
        "record",
        "joined",
        "set-up",
        "gather",
        "begin",
        "transfer",
        "verify",
        "commit",
    ]
    assert sorted(set(phases), key=phases.index) == wanted
    assert {step.engine for step in steps if step.phase in ("wait", "record", "joined")} == {engine.url}
    assert (steps[-3].done, steps[-3].total) == (1, 1), "the last that is told of the transfer: all workers have it"


def test_a_server_that_never_comes_is_named_with_what_was_there_instead() -> None:
    held = HeldPort()
    try:
        with Publisher(values_of(1), [f"http://127.0.0.1:{held.number}"], timeout_s=20) as publisher:
            with pytest.raises(DeadlineExceeded, match=r"no server was there within 0.5 s: .*refused.*wait longer"):
                publisher.connect(wait_s=0.5)
            with pytest.raises(PeerLost, match="Is the server running"):
                publisher.connect()
    finally:
        held.close()


class _Proxy(BaseHTTPRequestHandler):
    """Answers for a server that is still loading, twice; the server itself has no routes of ours."""

    asked = 0

    def do_GET(self) -> None:
        _Proxy.asked += 1
        self.send_response(503 if _Proxy.asked <= 2 else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.mark.parametrize("call", ["connect", "add"])
def test_a_proxy_that_answers_in_the_servers_place_is_waited_for(call: str) -> None:
    _Proxy.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}"
        try:
            with (
                Publisher(values_of(1), [url] if call == "connect" else [], timeout_s=20) as publisher,
                pytest.raises(EngineError, match="answered 404"),
            ):
                publisher.connect(wait_s=30) if call == "connect" else publisher.add(url, wait_s=30)
        finally:
            proxy.shutdown()
    assert _Proxy.asked == 4, "two answers of the proxy's, one of the server's, and that to the call itself"


def test_closing_ends_the_wait() -> None:
    held, waiting, ended = HeldPort(), threading.Event(), []

    def note(step: Step) -> None:
        waiting.set()

    publisher = Publisher(values_of(1), [f"http://127.0.0.1:{held.number}"], timeout_s=20, on_progress=note)

    def connect() -> None:
        try:
            publisher.connect(wait_s=90)
        except WeightcastError as error:
            ended.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        assert waiting.wait(30)
        publisher.close()
        thread.join(30)
        assert not thread.is_alive()
        assert "called off" in str(ended[0])
    finally:
        publisher.close()
        held.close()
