"""Hints of a server: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from server_helpers import client_for
from tests.support.mistakes import Mistake

from weightcast.cli.serve import _bound, _transfer_config
from weightcast.errors import InvalidInput
from weightcast.server import ServerConfig
from weightcast.server.auth import check_host
from weightcast.server.run import bind, ready_file
from weightcast.server.unix_socket import unix_socket
from weightcast.testing.scripted_engine import ScriptedEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
IDS = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
HI = [{"role": "user", "content": "hi"}]


async def _play(
    http: Any, path: str, wrong: dict[str, Any], status: int, said: str, right: dict[str, Any] | None
) -> None:
    """Send what is wrong, look at the answer, and send what its hint asks for."""
    answer = await http.post(path, json=wrong)
    assert answer.status_code == status, answer.text
    assert re.search(said, answer.json()["error"]["message"]), answer.text
    if right is not None:
        again = await http.post(path, json=right)
        assert again.status_code == 200, again.text


@pytest.mark.parametrize(
    ("path", "wrong", "status", "said", "right"),
    [
        (COMPLETIONS, {"prompt": [1, "two"]}, 422, r"mixes token ids.*Send one list of token ids, or a list of prompts",
         {"prompt": ["one", "two"], "max_tokens": 1}),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, 422, r"best_of='3'.*Only best_of = n is possible", {"prompt": "x", "n": 3}),
        (COMPLETIONS, {"prompt": "x", "stream": True, "prompt_logprobs": 1}, 422, r"cannot be streamed\. Leave out stream",
         {"prompt": "x", "prompt_logprobs": 1, "max_tokens": 1}),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 422, r"suffix='y' is not supported here\. Leave suffix out", {"prompt": "x"}),
        (COMPLETIONS, {"prompt": "x", "guided_json": {}}, 422, "Use structured_outputs", None),
        (COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": 4}, 422, "Shorten the prompt before sending it", {"prompt": "x"}),
        (CHAT, {"messages": HI, "echo": True}, 422, "Put the last message in front yourself", {"messages": HI}),
        (CHAT, {"messages": HI, "add_special_tokens": True}, 422, "The chat template writes the special tokens",
         {"messages": HI}),
        ("/start_weight_update", {"is_checkpoint_format": False}, 422, "Send weights under checkpoint names", None),
        ("/weight_checker", {"action": "reset"}, 422, "Compare checksums from before and after", None),
        ("/sleep", {}, 422, "Do without this route", None),
        ("/generate", {**IDS, "return_logprob": True, "logprob_start_len": 0}, 422,
         r"not in this dialect.*Leave logprob_start_len away, or ask /v1/completions", {**IDS, "return_logprob": True}),
        ("/generate", {**IDS, "lora_path": "a"}, 422, "lora_path is not supported by this engine.*Leave the field away", IDS),
        ("/generate", {**IDS, "image_data": "a"}, 422, "image_data is not supported.*Leave the field away", IDS),
        ("/generate", {**IDS, "stream": True, "sampling_params": {"n": 2}}, 422,
         "a stream has one answer a prompt.*Send n prompts, or do not stream", {**IDS, "sampling_params": {"n": 2, "max_new_tokens": 1}}),
    ],
)  # fmt: skip
async def test_requests(
    http: Any, path: str, wrong: dict[str, Any], status: int, said: str, right: dict[str, Any] | None
) -> None:
    await _play(http, path, wrong, status, said, right)


async def test_a_server_without_a_tokenizer(http: Any, engine: ScriptedEngine) -> None:
    """That token ids are served then is seen by the embedded engine's tests: this engine's own script is made of words."""
    engine.tokenizer = None
    for path, wrong, said in (
        (COMPLETIONS, {"prompt": "x", "add_special_tokens": False}, r"no tokenizer\. Send token ids"),
        ("/tokenize", {"prompt": "x"}, r"no tokenizer\. Send token ids to /v1/completions"),
        (CHAT, {"messages": HI}, r"no chat template\. Use /v1/completions"),
    ):
        await _play(http, path, wrong, 422, said, None)


async def test_an_engine_that_does_not_serve_says_what_makes_it_serve() -> None:
    async with client_for(ScriptedEngine(wait_for_weights=True)) as http:
        for answer in (await http.get("/ready"), await http.post(COMPLETIONS, json={"prompt": "x"})):
            assert answer.status_code == 503
            assert "weightcast push" in answer.text


@pytest.mark.parametrize(
    ("client", "headers", "said"),
    [
        ("203.0.113.5", {}, "answers loopback only, not 203.0.113.5"),
        ("127.0.0.1", {"host": "models.example"}, "the host header must name this machine"),
        ("127.0.0.1", {"via": "1.1 proxy"}, r"that a proxy passed on \(via\)"),
        ("127.0.0.1", {"origin": "https://elsewhere.example"}, "without a token .*elsewhere.example"),
    ],
)
async def test_callers_from_elsewhere_where_there_is_no_token(
    engine: ScriptedEngine, client: str, headers: dict[str, str], said: str
) -> None:
    async with client_for(engine, client=client) as http:
        answer = await http.post("/pause", headers=headers)
    assert answer.status_code == 401
    assert re.search(f"{said}.*Start the server with a token", answer.json()["error"]["message"]), answer.text
    async with client_for(engine, ServerConfig(token="t0ken"), client=client) as http:
        for wrong, told in (({}, "this route needs the token"), ({"authorization": "Bearer x"}, "wrong token")):
            answer = await http.post("/pause", headers={**headers, **wrong})
            assert re.search(f"{told}.*Send 'Authorization: Bearer ...'", answer.json()["error"]["message"])
        assert (await http.post("/pause", headers={**headers, "authorization": "Bearer t0ken"})).status_code == 200


async def test_a_missing_api_key_is_no_token_of_a_publisher(engine: ScriptedEngine) -> None:
    async with client_for(engine, ServerConfig(token="t0ken", api_key="k3y")) as http:
        message = (await http.post(COMPLETIONS, json={"prompt": "x"})).json()["error"]["message"]
        assert "this route needs the API key. Send 'Authorization: Bearer ...'" in message
        assert "Publisher" not in message
        good = await http.post(COMPLETIONS, json={"prompt": "x"}, headers={"authorization": "Bearer k3y"})
        assert good.status_code == 200


# -- what a server is started with


def test_addresses_and_ports(tmp_path: Path) -> None:
    Mistake(
        make=lambda: check_host("0.0.0.0", None), error=InvalidInput, said="no token guards the weights",
        hint="--token-file .*or bind 127.0.0.1",
        follow=lambda: (check_host("0.0.0.0", "t0ken"), check_host("127.0.0.1", None)),
    ).play()  # fmt: skip
    Mistake(
        make=lambda: bind("192.0.2.1", 0), error=InvalidInput, said="cannot bind 192.0.2.1",
        hint="an address of this machine, or 0.0.0.0", follow=lambda: bind("127.0.0.1", 0).close(),
    ).play()  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as taken:
        Mistake(
            make=lambda: bind("127.0.0.1", taken.getsockname()[1]), error=InvalidInput, said="in use",
            hint="Port 0 picks a free one", follow=lambda: bind("127.0.0.1", 0).close(),
        ).play()  # fmt: skip
    Mistake(
        make=lambda: _bound("127.0.0.1", None, tmp_path / "s", None), error=InvalidInput, said="takes the place of --host",
        hint="Leave those out", follow=lambda: _bound(None, None, tmp_path / "s", None).__enter__().close(),
    ).play()  # fmt: skip


def test_files_of_a_server(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")

    def serve_at(path: Path) -> None:
        with unix_socket(path):
            pass

    def say_ready(path: Path) -> None:
        with ready_file(path) as write:
            write("http://127.0.0.1:1")

    Mistake(
        make=lambda: serve_at(tmp_path / "file"), error=InvalidInput, said="cannot serve on", hint="another path",
        follow=lambda: serve_at(tmp_path / "socket"),
    ).play()  # fmt: skip
    Mistake(
        make=lambda: say_ready(tmp_path / "no" / "ready"), error=InvalidInput, said="ready file .* cannot be written",
        hint="a path in a folder that is there", follow=lambda: say_ready(tmp_path / "ready"),
    ).play()  # fmt: skip


@pytest.mark.parametrize("text", ["{backend: x}", "[]"])
def test_a_transfer_config_that_is_no_object(text: str) -> None:
    def follow() -> None:
        assert _transfer_config('{"backend": "weightcast"}', False) == {"backend": "weightcast"}

    Mistake(
        make=lambda: _transfer_config(text, False), error=InvalidInput, said="JSON", hint=r'\{"backend": "weightcast", "mode": "staged"\}, in single quotes',
        follow=follow,
    ).play()  # fmt: skip
