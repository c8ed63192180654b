"""One HTTP call with one deadline: connecting, resolving, TLS, reading and writing all end with it, also when it is moved."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpcore
import pytest
import torch
from tests.support.ports import HeldPort

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.fan_out import Call, make_calls
from weightcast.trainer.clients.urls import endpoint_of

Take = Callable[..., httpcore.Response]
LONG_S = 600.0
"""Longer than a test may take."""
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port whose queue of connections is full: to connect there takes for ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(3):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(listener.getsockname())
        time.sleep(0.2)
        yield listener.getsockname()[1]
        for connection in waiting:
            connection.close()


def take_alone(url: str, deadline: Deadline, content: bytes | None = None) -> httpcore.Response:
    return wire.request("POST", endpoint_of(url), "/", content, deadline)


def take_as_one_of_many(url: str, deadline: Deadline, content: bytes | None = None) -> httpcore.Response:
    (call,) = make_calls([Call("POST", endpoint_of(url), "/", content, deadline)])
    return call.response()


@pytest.fixture(params=[take_alone, take_as_one_of_many], ids=["alone", "one of many"])
def take(request: pytest.FixtureRequest) -> Take:
    way: Take = request.param
    return way


def serve_once(context: ssl.SSLContext | None = None, read_nbytes: int = 1) -> tuple[threading.Thread, int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as plain:
            connection = plain if context is None else context.wrap_socket(plain, server_side=True)
            heard = 0
            while heard < read_nbytes:
                heard += len(connection.recv(65536))
            connection.sendall(ANSWER)
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, listener.getsockname()[1]


def test_connecting_ends_when_another_thread_cancels_the_deadline(deaf_port: int, take: Take) -> None:
    deadline = Deadline(LONG_S)
    threading.Timer(0.3, deadline.cancel).start()
    with pytest.raises(httpcore.ConnectTimeout):
        take(f"http://127.0.0.1:{deaf_port}/", deadline)


def test_a_publisher_closes_while_an_engine_lets_it_wait_for_a_connection(deaf_port: int) -> None:
    well = LocalEngine("well", [DictModel({"w": torch.ones(4)})], mode="staged")
    publisher = Publisher(
        {"w": torch.zeros(4)}, [well, f"http://127.0.0.1:{deaf_port}"], timeout_s=LONG_S, require="live"
    )
    try:
        publisher.publish(timeout_s=3)
        publisher.publish(timeout_s=3)
    finally:
        publisher.close()
        well.stop()


def test_resolving_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch, take: Take) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hangs(*_: object, **__: object) -> list[object]:
        asked.set()
        go_on.wait(LONG_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    with pytest.raises(httpcore.ConnectTimeout):
        take("http://engine.example:80/", Deadline(0.3))
    assert asked.is_set()
    go_on.set()


def test_nobody_there_is_a_connect_error(take: Take) -> None:
    held = HeldPort()
    for url in (
        f"http://127.0.0.1:{held.number}/",
        f"http://localhost:{held.number}/",
        "http://no.such.host.invalid:1/",
    ):
        with pytest.raises(httpcore.ConnectError):
            take(url, Deadline(10))
    held.close()


def test_a_long_body_goes_out_whole_and_one_that_nobody_reads_ends_with_the_deadline(take: Take) -> None:
    content = b"x" * 20_000_000
    thread, port = serve_once(read_nbytes=len(content))
    assert take(f"http://localhost:{port}/", Deadline(20), content).status == 200
    thread.join(20)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(httpcore.WriteTimeout):
        take(f"http://127.0.0.1:{listener.getsockname()[1]}/", Deadline(0.5), content)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(httpcore._sync.connection, "default_ssl_context", lambda: trusted)
    thread, port = serve_once(context)
    assert take_alone(f"https://localhost:{port}/", Deadline(20)).content == b"{}"
    thread.join(20)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(httpcore.ConnectTimeout):
        take_alone(f"https://localhost:{listener.getsockname()[1]}/", Deadline(0.5))
