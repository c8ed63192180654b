"""Hints fit the mistake: each is reached by the mistake that leads to it, and names what mends it."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from weightcast import InvalidInput, Publisher, Unsupported, WeightcastError
from weightcast.cli.wording import in_options
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, PlanMismatch, StateError
from weightcast.server.auth import TokenAuth
from weightcast.trainer.clients import HttpEngineClient
from weightcast.transports.tls import own_identity

NOBODY = ["http://127.0.0.1:9"]


def _raises(name: str) -> str:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"timeout_s": None}, "timeout_s", "a positive number of seconds.*not None"),
        ({"timeout_s": 1e12}, "timeout_s", "at most 1e.09"),
        ({"timeout_s": True}, "timeout_s", "a positive number of seconds"),
        ({"engines": None}, "engines", r"engines is a list, not None.*call add\(\)"),
        ({"engines": {"a": 1}}, "engines", r"engines is a list, not a mapping.*Give \[url"),
        ({"engines": [3]}, "engines", "3 is no engine, but of type int.*An engine is the URL"),
        ({"bucket_nbytes": 3}, "bucket_nbytes", "a multiple of 256.*not 3.*Leave it out"),
        ({"bucket_nbytes": "8"}, "bucket_nbytes", "a multiple of 256.*not '8'"),
        ({"takeover": "no"}, "takeover", "True or False, not 'no'"),
        ({"transport": 3}, "transport", "a text, not 3"),
        ({"log": 3}, "log", "the path of a file, not 3"),
        ({"source": {"a": 1}}, None, "'a' is no torch tensor.*Give tensors only"),
        (
            {"rename": _raises},
            "rename",
            "rename raised KeyError: 'weight', for 'weight'.*Have the function return each",
        ),
        ({"rename": lambda name: None}, "rename", "which is no name.*Have the function return each"),
        ({"process_group": 3}, "process_group", "a group, None or 'auto', not 3.*new_group"),
        ({"process_group": True}, "process_group", "a group, None or 'auto', not True"),
        ({"token": b"x"}, "token", "token is a text, not bytes.*Decode"),
        ({"metrics_port": 99999}, "metrics_port", "cannot serve metrics.*from 1 to 65535"),
        ({"metrics_port": "x"}, "metrics_port", "cannot serve metrics.*from 1 to 65535"),
    ],
)
def test_bad_values_of_a_publisher_are_named_with_what_to_do(given: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        Publisher(**{"source": nn.Linear(2, 2), "engines": NOBODY, **given})
    if field:
        assert caught.value.field == field


def test_a_transport_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(Unsupported, match=r"no transport 'pigeon'\. Known: .*shm"):
        Publisher(nn.Linear(2, 2), NOBODY, transport="pigeon")


def _served(answer: bytes, wrap: ssl.SSLContext | None = None) -> Any:
    """Somebody who listens, and says ``answer`` to who comes; yields the port."""

    @contextmanager
    def listening() -> Iterator[int]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            over = threading.Event()

            def serve() -> None:
                while not over.is_set():
                    try:
                        connection, _ = server.accept()
                    except TimeoutError:
                        continue
                    with connection:
                        try:
                            connection.settimeout(5)
                            speaking = connection if wrap is None else wrap.wrap_socket(connection, server_side=True)
                            speaking.recv(65536)
                            speaking.sendall(answer)
                        except (OSError, ssl.SSLError):
                            continue

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield server.getsockname()[1]
            finally:
                over.set()
                thread.join()

    return listening()


def _asked(url: str) -> WeightcastError:
    with pytest.raises(WeightcastError) as caught:
        HttpEngineClient(url).status(Deadline(10))
    return caught.value


def _tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    file = os.memfd_create("certificate")
    try:
        os.write(file, own_identity())
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return context


def test_https_where_http_is_spoken() -> None:
    with _served(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n") as port:
        error = _asked(f"https://127.0.0.1:{port}")
    assert type(error).__name__ == "PeerLost"
    assert error.hint == "Is it http:// instead of https://?"


def test_http_where_tls_is_spoken() -> None:
    with _served(b"\x15\x03\x03\x00\x02\x02\x0a") as port:
        error = _asked(f"http://127.0.0.1:{port}")
    assert "is it https:// instead of http://" in str(error.hint)


def test_https_with_a_certificate_that_nobody_vouches_for() -> None:
    with _served(b"", _tls()) as port:
        error = _asked(f"https://127.0.0.1:{port}")
    assert "the certificate is not trusted" in error.message
    assert "SSL_CERT_FILE" in str(error.hint)


def test_a_host_that_has_no_name_and_a_port_that_nobody_listens_on() -> None:
    assert _asked("http://no.such.host.invalid:8000").hint == "Check the name of the host"
    assert _asked(NOBODY[0]).hint == "Is the server running?"


@pytest.mark.parametrize("call", ["publish", "connect", "prepare"])
def test_a_publisher_that_is_closed(call: str) -> None:
    publisher = Publisher(nn.Linear(2, 2), NOBODY)
    publisher.close()
    with pytest.raises(StateError, match=r"the publisher is closed\. Make a new Publisher"):
        getattr(publisher, call)()


# -- in the words of the command line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            AuthError("this route needs the token", hint=TokenAuth("t0ken")._hint),
            "this route needs the token. Give --token-file FILE, or set WEIGHTCAST_TOKEN",
        ),
        (
            PlanMismatch("no place", hint="Leave out, by unused=['v_head.*', 'a[b]']"),
            "Leave out, by --unused 'v_head.*' --unused 'a[b]'",
        ),
        (PlanMismatch("no place", hint="publish with rename={'a.': 'b c.'}"), "publish with --rename 'a.=b c.'"),
        (StateError("another trainer", hint="Close it, or join with takeover=True"), "join with --takeover"),
        (StateError("no room", hint='Ask for mode="in_place"'), "Ask for --mode in_place"),
        (StateError("no room", hint="Call publish() again"), "Run the command again"),
        (
            StateError("a is NaN", hint='Find out; check_finite="count" publishes them and counts them in the report'),
            "Find out; without --check-finite they are published",
        ),
    ],
)
def test_a_hint_names_options_at_the_command_line(error: WeightcastError, said: str) -> None:
    assert said in in_options(error)
