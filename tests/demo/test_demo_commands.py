"""The demo and the commands against real server processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from weightcast.cli import app
from weightcast.demo.policy import build_policy, save_folder
from weightcast.demo.record import Options
from weightcast.demo.server import ServerProcess, free_port
from weightcast.demo.sorting import run_demo
from weightcast.errors import EngineError
from weightcast.report.model import Report

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    save_folder(folder)
    with ServerProcess(folder, "--load-format", "dummy", "--dtype", "float32", "--device", "cpu") as process:
        process.wait_until_listening()
        yield process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_folder(folder)
    save_file(build_policy(91).state_dict(), folder / "model.safetensors")
    return folder


def weightcast(*arguments: object, token: str | None = None) -> Result:
    environment = {"WEIGHTCAST_TOKEN": token, "COLUMNS": "200"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_push_status_and_verify_agree(server: ServerProcess, checkpoint: Path, tmp_path: Path) -> None:
    unproven = weightcast("verify", server.url, "--checkpoint", checkpoint, token=server.token)
    assert unproven.exit_code == 1, "random weights are not the checkpoint"

    pushed = weightcast("push", checkpoint, "--to", server.url, "--json", token=server.token)
    assert pushed.exit_code == 0, pushed.output
    report = Report.from_json(pushed.output.strip().splitlines()[-1])
    assert report.ok
    assert report.digests_match
    assert report.nbytes == sum(tensor.nbytes for tensor in load_file(checkpoint / "model.safetensors").values())

    shown = weightcast("status", server.url)
    assert shown.exit_code == 0
    assert report.version in shown.output
    assert report.digest in shown.output
    assert "ready" in shown.output

    verified = weightcast("verify", server.url, "--checkpoint", checkpoint, token=server.token)
    assert verified.exit_code == 0, verified.output
    assert report.digest in verified.output

    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    differing = weightcast("verify", server.url, "--checkpoint", tmp_path, token=server.token)
    assert differing.exit_code == 1
    assert f"different: {name}" in differing.output
    assert "1 different" in differing.output


def test_a_person_reads_the_push(server: ServerProcess, checkpoint: Path) -> None:
    pushed = weightcast("push", checkpoint, "--to", server.url, "--transport", "gloo", token=server.token)
    assert pushed.exit_code == 0, pushed.output
    assert "gloo" in pushed.output
    assert "matches what is live" in pushed.output


def test_wrong_token_changes_nothing(server: ServerProcess, checkpoint: Path) -> None:
    before = weightcast("status", server.url).output
    pushed = weightcast("push", checkpoint, "--to", server.url, token="wrong")
    assert pushed.exit_code == 1
    assert "AuthError" in pushed.output
    assert "Traceback" not in pushed.output
    refused = weightcast("verify", server.url, "--checkpoint", checkpoint, token="wrong")
    assert refused.exit_code == 1
    assert "AuthError" in refused.output
    assert weightcast("status", server.url).output == before


def test_status_says_who_cannot_be_reached(server: ServerProcess) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    shown = weightcast("status", server.url, gone)
    assert shown.exit_code == 1
    assert "PeerLost" in shown.output
    assert "ready" in shown.output


def test_a_folder_without_weights_is_refused(server: ServerProcess, tmp_path: Path) -> None:
    pushed = weightcast("push", tmp_path, "--to", server.url, token=server.token)
    assert pushed.exit_code == 1
    assert "no safetensors files" in pushed.output


def test_doctor_tries_real_transfers() -> None:
    found = weightcast("doctor")
    assert found.exit_code == 0, found.output
    lines = {tuple(line.split()[1:3]): line for line in found.output.splitlines() if line.split()[:1] in (["✓"], ["✗"])}
    for name in ("shm", "gloo"):
        line = lines["transport", name]
        assert line.startswith("✓"), line
        assert line.rstrip().endswith("exact")
    assert torch.__version__ in lines["package", "torch"]


def test_a_tiny_run_of_the_demo_proves_every_round(tmp_path: Path) -> None:
    options = Options(
        iterations=3, num_prompts=8, group_size=8, warm_up=0.04, warm_up_steps=40, held_out=16, seed=92,
        report=tmp_path / "page.html",
    )  # fmt: skip
    verdict = run_demo(options, Console(quiet=True))
    assert verdict.passed, verdict
    assert "4 of 4" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_server_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "nothing") as process:
        with pytest.raises(EngineError, match="ended with status"):
            process.wait_until_listening()
        pid = process.pid
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_no_server(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weightcast.cli", "demo", "--report", str(tmp_path / "page.html")]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "COLUMNS": "200"})
    try:
        assert demo.stdout is not None
        line = demo.stdout.readline().decode()
        server = psutil.Process(int(line.partition("(process ")[2].partition(")")[0]))
        assert "serve" in server.cmdline()
        demo.send_signal(number)
        assert demo.wait(30) != 0
        end = time.monotonic() + 5
        while server.is_running() and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.is_running()
    finally:
        demo.kill()
        demo.communicate()


def test_reports_of_pushes_are_json(server: ServerProcess, checkpoint: Path) -> None:
    pushed = weightcast("push", checkpoint, "--to", server.url, "--mode", "in_place", "--json", token=server.token)
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.output)["mode"] == "in_place"
