"""A token is never told: not in what is printed, logged, reported, measured or shown, whether things go well or fail."""

from __future__ import annotations

import base64
import logging
import secrets
import signal
from pathlib import Path

import httpx
import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file
from serve_process import environment, serving
from tests.support.forked import COMMAND, run_forked

from weightcast import Publisher
from weightcast.control import Coordinator, JoinInfo
from weightcast.errors import WeightcastError
from weightcast.facts import Facts
from weightcast.messages import Hello
from weightcast.report.page import Page, write_page
from weightcast.server import ServerConfig
from weightcast.testing.models import build_tiny_model
from weightcast.transports.cuda_ipc import CudaIpcOffer
from weightcast.transports.gpu_exports import MappingOffer
from weightcast.transports.nccl_cut import NcclOffer
from weightcast.transports.tcp import TcpOffer
from weightcast.transports.tcp_ends import EdgeOffer
from weightcast.weight_transfer.weightcast import WeightcastInitInfo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("secrets") / "model", "llama", "float32")


def weightcast(*arguments: object, **more: str) -> str:
    """All that a command prints."""
    _, printed = run_forked(COMMAND, *arguments, environment=environment(**more), timeout_s=100)
    assert "Traceback" not in printed, printed
    return printed


def fails(publisher: Publisher) -> str:
    with pytest.raises(WeightcastError) as caught:
        publisher.publish()
    return f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {getattr(caught.value, '__notes__', '')}"


@pytest.mark.timeout(300)
def test_nothing_that_is_told_has_the_token(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token, other = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    file, wrong = tmp_path / "token", tmp_path / "wrong"
    file.write_text(token + "\n")
    wrong.write_text(other + "\n")
    told: list[str] = []
    caplog.set_level(logging.DEBUG)
    (weights,) = model.glob("*.safetensors")
    tensors = {name: torch.randn_like(value) for name, value in load_file(weights).items()}
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    save_file(tensors, pushed / "model.safetensors")
    with serving(
        model, tmp_path, "--token-file", file, "--log-level", "debug", "--log-format", "json", forked=False
    ) as server:
        command_line = Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode()
        named = server.url.replace("://", f"://somebody:{token}@")
        log = tmp_path / "rounds.jsonl"
        with Publisher(tensors, [named], timeout_s=20, log=log, metrics_port=0) as publisher:
            report = publisher.publish()
            assert report.ok
            told += [str(report), repr(report), report.to_json(), repr(publisher)]
            told.append(write_page(tmp_path / "page.html", Page(title="page", reports=[report])).read_text())
            told.append(httpx.get(f"http://127.0.0.1:{publisher.metrics_port}/metrics").text)
        for given in (server.url, named.replace(token, other), named):
            bad = {"token": None if "@" in given else other}
            with Publisher({"nowhere": torch.rand(3)}, [given], timeout_s=20, log=log, **bad) as publisher:
                told.append(fails(publisher))
        told += [log.read_text()]
        for given in (token, other):
            header = {"authorization": f"Bearer {given}"}
            for path in ("/metrics", "/weightcast/status", "/weightcast/status?checksums=true", "/weightcast/rounds",
                         "/weightcast", "/openapi.json", "/server_info", "/health", "/nothing"):  # fmt: skip
                told.append(httpx.get(server.url + path, headers=header).text)
            told.append(httpx.post(f"{server.url}/weightcast/commit", headers=header, json={"epoch": -1}).text)
        told.append(weightcast("push", pushed, "--to", server.url, "--token-file", file))
        told.append(weightcast("push", pushed, "--to", named.replace(token, other)))
        told.append(weightcast("verify", named, "--checkpoint", pushed))
        told.append(weightcast("status", server.url, "--token-file", wrong))
        told.append(weightcast("status", server.url, WEIGHTCAST_TOKEN=f"{token} {other}"))
        told.append(weightcast("status", server.url, "--token", f"{token}\u00f6"))
        told.append(weightcast("status", server.url, "--token", f"{token}\r\nX: 1"))
        status, output = server.stop(signal.SIGTERM)
        assert status == 0, output
    with Publisher(tensors, [named], timeout_s=3, log=log) as publisher:
        told.append(fails(publisher))
    told += [output, command_line, log.read_text(), caplog.text, *(str(record.args) for record in caplog.records)]
    assert len(output) > 1000, "the server has logged something at all"
    assert sum("AuthError" in text for text in told) >= 4, "a wrong token was refused in several ways"
    assert sum("InvalidInput: token must be" in text for text in told) == 3
    hidden = [
        secret for each in (token, other) for secret in (each, base64.b64encode(f"somebody:{each}".encode()).decode())
    ]
    for text in told:
        for secret in hidden:
            assert secret not in text, text[:2000]


def test_records_that_carry_a_secret_do_not_show_it() -> None:
    secret = secrets.token_hex(16)
    about = {
        "address": "tcp://127.0.0.1:1",
        "public_key": zmq.curve_keypair()[0].decode(),
        "ticket": secret,
        "engine": "e",
    }
    facts = Facts(host="h", pid=1, device="cpu")
    hello = {"rank": 0, "world_size": 1, "version": "default", "digest": "", "dirty": False, "highest": 0}
    place = {"address": "a", "port": 1, "secret": secret.encode()}
    coordinator = Coordinator()
    coordinator.issue_ticket("e", 1)
    edge = EdgeOffer(fed_secret=secret.encode()[:32], feeds_secret=secret.encode()[:32], patience_s=1.0)
    records = [
        edge,
        JoinInfo(**about),
        WeightcastInitInfo(**about),
        Hello(ticket=secret, engine="e", facts=facts, **hello),
        TcpOffer(bucket_nbytes=256, lanes=1, plan="p", identity=secret.encode(), edge=edge, **place),
        NcclOffer(unique_id=secret.encode(), rank=0, world_size=1, bucket_nbytes=1, cuts=(), **place),
        CudaIpcOffer(mapping=MappingOffer(process="p", segments=(), spans=(), is_arena=True), **place),
        ServerConfig(token=secret, api_key=secret),
        coordinator._tickets._out[0],
    ]
    for record in records:
        assert secret not in repr(record) + str(record) + f"{[record]}"
    assert coordinator._tickets._out[0].secret not in repr(coordinator._tickets._out)
    assert "engine='e'" in repr(records[1])
    coordinator.close()
