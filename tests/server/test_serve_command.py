"""weightcast serve: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from serve_process import command_line, environment, refused, serving

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, random_state_dict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("serve") / "model", "llama", "float32")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly_with_requests_in_flight(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    reasons: list[str] = []
    forked = number == signal.SIGINT  # once as a process that was started by a user
    with serving(model, tmp_path, "--max-model-len", 2048, forked=forked) as server:

        def stream() -> None:
            body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as answer:
                started.release()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        reasons.append(json.loads(line[6:])["choices"][0]["finish_reason"])

        started = threading.Semaphore(0)
        threads = [threading.Thread(target=stream) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert all(started.acquire(timeout=30) for _ in threads)
        # A paused engine with frozen requests must not keep the process from ending.
        assert httpx.post(f"{server.url}/pause", params={"mode": "keep"}, timeout=30).status_code == 200
        status, output = server.stop(number)
        for thread in threads:
            thread.join(20)
        assert status == 0, output
        assert "abort" in reasons
        assert not server.ready_file.exists()
        assert f"weightcast: serving {model} at {server.url}" in output.splitlines()
        assert "weightcast: no token" in output
        assert "Traceback" not in output


def test_waits_for_weights_and_reports_its_configuration(model: Path, tmp_path: Path) -> None:
    token = secrets.token_urlsafe(12)
    config = json.dumps({"backend": "weightcast", "mode": "in_place"})
    options = ("--wait-for-weights", "--load-format", "dummy", "--weight-transfer-config", config, "--host", "0.0.0.0")
    with serving(model, tmp_path, *options, WEIGHTCAST_TOKEN=token) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/health").status_code == 200
        ready = httpx.get(f"{url}/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["type"] == "EngineError"
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 503
        info = httpx.get(f"{url}/server_info").json()["vllm_config"]
        assert info["weight_transfer_config"] == {"backend": "weightcast", "mode": "in_place"}
        assert info["model_config"]["dtype"] == "float32"
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": "default", "digest": None}
        assert httpx.post(f"{url}/start_weight_update").status_code == 401
        bearer = {"authorization": f"Bearer {token}"}
        assert httpx.post(f"{url}/start_weight_update", headers=bearer).status_code == 409
        bad = httpx.post(f"{url}/weightcast/init", headers=bearer, json={"init_info": {"port": 1}})
        assert bad.status_code == 422, bad.text
        environ = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" in environ
        with Publisher(random_state_dict(model), [url], token=token, timeout_s=60) as publisher:
            versions = [publisher.publish().version for _ in range(2)]
        assert httpx.get(f"{url}/ready").status_code == 200
        status, output = server.stop(signal.SIGTERM, timeout_s=60)
    assert status == 0, output
    assert token not in output
    form = (
        r"\S+ \S+ INFO weightcast\.receiver\.receiver: version (\S+) is live: [1-9]\d* bytes by \w+ in .* \(in_place\)"
    )
    assert re.findall(f"^{form}$", output, re.MULTILINE) == versions, "one line a round"
    assert output.count(" is live") == len(versions)


def test_openmp_threads_wait_passively() -> None:
    """torch reads the variable when it is imported, so the command line must not import torch before setting it."""
    code = "import sys, weightcast.cli, weightcast.cli.serve; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([*command_line()[:2], code], env=environment(), timeout=60, check=False)
    assert ended.returncode == 0


def test_refuses_a_public_address_without_a_token(model: Path) -> None:
    said = refused(model, "--host", "0.0.0.0")
    assert "--host 0.0.0.0" in said
    assert "WEIGHTCAST_TOKEN" in said


def test_refuses_a_taken_port(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refused(model, "--port", port)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--weight-transfer-config", "{"), "not JSON"),
        (("--weight-transfer-config", "[]"), "JSON object"),
        (("--weight-transfer-config", '{"colour": 1}'), "colour"),
        (("--dtype", "int7"), "dtype"),
    ],
)
def test_refuses_bad_options(model: Path, arguments: tuple[str, ...], wanted: str) -> None:
    assert wanted in refused(model, *arguments)


def test_refuses_what_is_not_there_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    said = refused(model, "--port", 0, "--ready-file", tmp_path / "nope" / "ready")
    assert f"there is no folder {tmp_path / 'nope'}" in said
    assert "InvalidInput: there is no device 'tpu' to run on" in refused(model, "--port", 0, "--device", "tpu")


def test_refuses_a_missing_model(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refused(tmp_path / "nothing").replace(os.linesep, "")


@pytest.mark.parametrize(
    ("backend", "said"),
    [("nccl", "the nccl backend needs a GPU"), ("mistyped", "no weight transfer backend 'mistyped'")],
)
def test_refuses_a_backend_that_cannot_work_here(model: Path, backend: str, said: str) -> None:
    config = json.dumps({"backend": backend})
    assert said in refused(model, "--device", "cpu", "--port", 0, "--weight-transfer-config", config)
