"""URLs and tokens as callers give them: what is refused, what is sent, and that no secret is in a name or an error."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import InvalidInput, StateError
from weightcast.trainer.clients import HttpEngineClient, VllmDevClient
from weightcast.trainer.clients.urls import endpoint_of, engine_name
from weightcast.untrusted.secret import MAX_TOKEN_CHARACTERS, token_from_file, usable_token
from weightcast.vllm_protocol.nccl.trainer import _Server

UNUSABLE = ["", " \n", "s3cret tok", "s3cret\x00", "s3cret\r\nX-Evil: 1", "s3cr\xe9t", "s3cret" * MAX_TOKEN_CHARACTERS]


@pytest.mark.parametrize("token", UNUSABLE)
def test_a_token_that_no_header_carries_is_refused_without_its_value(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    calls = [
        lambda: usable_token(token),
        lambda: HttpEngineClient("http://h:1", token=token),
        lambda: _Server("http://h:1", token),
        lambda: Publisher({"w": torch.rand(2)}, ["http://h:1"], token=token),
        lambda: Publisher({"w": torch.rand(2)}, [], token=token),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="token must be") as caught:
            call()
        assert caught.value.field == "token"
        assert "s3cr" not in str(caught.value) + repr(caught.value)
    with pytest.raises(InvalidInput) as caught:
        token_from_file(file)
    assert caught.value.field == "token_file"
    assert "s3cr" not in str(caught.value) + repr(caught.value)


def test_a_token_loses_the_newline_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\r\n")
    assert usable_token(" s3cret\n") == token_from_file(file) == "s3cret"
    assert usable_token(None) is None
    assert endpoint_of("http://h:1", "s3cret\n").headers == {"Authorization": "Bearer s3cret"}
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidInput, match="cannot read the token file"):
            token_from_file(missing)


@pytest.mark.parametrize(
    "url", ["http://us%3Aer:pass%40word@h:8000/", "http://:pass%40word@h:8000", "http://us@h:8000"]
)
def test_user_and_password_leave_the_name_and_are_sent(url: str) -> None:
    clients = [HttpEngineClient(url), VllmDevClient(url)]
    for client in clients:
        assert (client.name, client.host) == ("http://h:8000", "h")
        scheme, _, pair = client._endpoint.headers["Authorization"].partition(" ")
        assert scheme == "Basic"
        user, _, password = url.removeprefix("http://").partition("@h")[0].partition(":")
        assert base64.b64decode(pair).decode() == f"{user}:{password}".replace("%3A", ":").replace("%40", "@")
    both = endpoint_of(url, "t0ken").headers
    assert both["X-Weightcast-Token"] == "t0ken"
    assert both["Authorization"].startswith("Basic ")
    assert "pass" not in repr(endpoint_of(url))
    assert engine_name(url) == "http://h:8000"


@pytest.mark.parametrize(
    "url",
    ["http://u:s3cret@", "ftp://u:s3cret@h", "http://u:s3cret@h:99999", "http://u:s3cret@[::1", "http://u:s3cret@h:x",
     "http://u:s3cret@h/v1", "http://u:s3cret@h?x=1", "http://u:s3cret@h#x", "http://u:s3cret@h\n", "http://u:s3/cret@h:1 "],
)  # fmt: skip
def test_a_url_that_is_refused_is_shown_without_its_password(url: str) -> None:
    for make in (HttpEngineClient, VllmDevClient, lambda url: _Server(url, None)):
        with pytest.raises(InvalidInput, match="an engine is http://host:port") as caught:
            make(url)
        shown = str(caught.value) + repr(caught.value)
        assert "s3cret" not in shown
        assert "s3/cret" not in shown
        assert caught.value.field == "engines"


@pytest.mark.parametrize("url", ["http://h:8000/v1", "http://h:8000/v1/", "https://h/models/v1"])
def test_the_url_of_openais_routes_is_told_at_once(url: str) -> None:
    with pytest.raises(InvalidInput, match="/v1") as caught:
        Publisher({"w": torch.rand(2)}, [url])
    assert caught.value.hint == "Leave out /v1"
    assert endpoint_of(url.replace("/v1", "")).url == url.partition("/v1")[0]


def test_an_engine_is_removed_by_the_url_that_it_was_given_by() -> None:
    with Publisher({"w": torch.rand(4)}, ["http://u:s3cret@127.0.0.1:9"], timeout_s=5) as publisher:
        with pytest.raises(StateError) as caught:
            publisher.remove("http://u:s3cret@127.0.0.1:10")
        assert "s3cret" not in str(caught.value)
        publisher.remove("http://u:s3cret@127.0.0.1:9/")
        with pytest.raises(StateError, match="no engine"):
            publisher.publish()


def test_an_engines_name_is_one_printable_line() -> None:
    class Named(HttpEngineClient):
        def __init__(self, name: str) -> None:
            super().__init__("http://127.0.0.1:9")
            self.name = name

    for name in ("two\nlines", "two  spaces", "\x1b[2J", "x" * 3000):
        with pytest.raises(InvalidInput, match="printable text on one line") as caught:
            Publisher({"w": torch.rand(2)}, [Named(name)])
        assert str(caught.value).isprintable()
