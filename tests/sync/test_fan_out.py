"""Many HTTP calls at once: each is answered, refused or late as it would be alone, and holds up no other one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import httpcore
import pytest
from tests.support.ports import HeldPort

from weightcast.deadline import Deadline
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.fan_out import Call, make_calls
from weightcast.trainer.clients.urls import endpoint_of

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
ANSWERS = {
    "length": OK,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n3\r\nabc\r\n0\r\n\r\n",
    "until it closes": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000,
    "refusal": b'HTTP/1.1 409 Conflict\r\nContent-Length: 14\r\n\r\n{"error": "no"}'[:-1],
    "first another": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "cut off": OK[:-1],
    "nothing": b"",
    "no HTTP": b"220 mail.example ESMTP\r\n",
    "too long": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000,
}

Serve = Callable[[bytes | None], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers each call with these bytes and closes, or, for None, never; its URL."""
    listeners, over = [], threading.Event()

    def start(answer: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        heard = b""
                        while not heard.endswith(b"\r\n\r\n{}"):
                            heard += connection.recv(65536)
                        assert heard.startswith(b"POST /x HTTP/1.1\r\n")
                        if answer is None:
                            over.wait(20)
                        else:
                            connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    over.set()
    for listener in listeners:
        listener.close()


def call_to(url: str, timeout_s: float = 10) -> Call:
    return Call("POST", endpoint_of(url), "/x", b"{}", Deadline(timeout_s))


def outcome_of(hear: Callable[[], httpcore.Response]) -> tuple[object, ...]:
    try:
        response = hear()
    except Exception as error:
        return type(error), str(error)
    return response.status, response.content


@pytest.mark.parametrize("kind", ANSWERS)
def test_each_answer_is_heard_as_a_call_alone_hears_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "too long":
        monkeypatch.setattr(wire, "ANSWER_NBYTES", 4000)
    url = serve(ANSWERS[kind])
    alone = outcome_of(lambda: wire.request("POST", endpoint_of(url), "/x", b"{}", Deadline(10)))
    for call in make_calls([call_to(url) for _ in range(3)]):
        assert outcome_of(call.response) == alone


def test_one_that_does_not_answer_holds_up_nobody(serve: Serve) -> None:
    port = HeldPort()  # a port that was let go of may become that of a server below
    nobody = f"http://127.0.0.1:{port.number}"
    silent, late = call_to(serve(None), 30), call_to(serve(None), 0.5)
    well = [call_to(serve(OK)) for _ in range(20)]
    heard = []
    for call in make_calls([silent, late, call_to(nobody), call_to("http://no.such.host.invalid:1"), *well]):
        heard.append(outcome_of(call.response)[0])
        if call is late:
            silent.deadline.cancel()
    port.close()
    assert heard.count(200) == len(well)
    assert heard.count(httpcore.ReadTimeout) == 2
    assert sum(isinstance(kind, type) and issubclass(kind, httpcore.ConnectError) for kind in heard) == 2


def test_hundreds_of_hosts_at_once() -> None:
    calls = [call_to(f"http://127.0.{number // 200}.{1 + number % 200}:9") for number in range(600)]
    assert {type(call.result) for call in make_calls(calls)} == {httpcore.ConnectError}


def test_calls_that_are_given_up_are_closed(serve: Serve) -> None:
    calls = [call_to(serve(OK)), call_to(serve(None))]
    made = make_calls(calls)
    next(made)
    made.close()
    assert isinstance(calls[1].result, httpcore.ReadTimeout)
    assert calls[1].waits_for() is None
