"""The demo and the commands against real server processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import uvicorn
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.server.serve_process import serving as serve
from tests.support.callers import serving
from tests.support.forked import COMMAND, Forked
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from weightcast import Publisher
from weightcast.cli import app
from weightcast.cli.roundtrip import devices_for
from weightcast.engines.base import InferenceEngine
from weightcast.engines.embedded import AsyncLLM
from weightcast.errors import EngineError
from weightcast.report.model import Report
from weightcast.server import create_app
from weightcast.sources import checkpoint_tensors
from weightcast.testing.models import build_tiny_model
from weightcast.testing.ports import free_port
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.transports import facts
from weightcast.transports.base import Facts
from weightcast_demo.policy import build_policy, save_folder
from weightcast_demo.record import Options
from weightcast_demo.server import ServerProcess
from weightcast_demo.sorting import run_demo

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


@dataclass
class Server:
    """Where a server is, and what it asks for."""

    url: str
    token: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, token = tmp_path_factory.mktemp("served"), secrets.token_urlsafe(24)
    save_folder(folder)
    options = ("--load-format", "dummy", "--dtype", "float32", "--device", "cpu")
    with serve(folder, tmp_path_factory.mktemp("url"), *options, WEIGHTCAST_TOKEN=token) as served:
        yield Server(served.url, token)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_folder(folder)
    save_file(build_policy(91).state_dict(), folder / "model.safetensors")
    return folder


def weightcast(*arguments: object, token: str | None = None) -> Result:
    environment = {"WEIGHTCAST_TOKEN": token, "COLUMNS": "200"}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


@contextmanager
def served(engine: InferenceEngine) -> Iterator[str]:
    """The URL of ``engine`` behind a server on a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(engine), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        asyncio.run(engine.shutdown())


@contextmanager
def answering(answer: bytes, drip_s: float | None = None) -> Iterator[str]:
    """The URL of a server that gives every request the same answer, and then a byte every ``drip_s``."""

    def answer_all(caller: socket.socket, stop: threading.Event) -> None:
        caller.recv(65536)
        caller.sendall(answer)
        while drip_s is not None and not stop.wait(drip_s):
            caller.sendall(b"x")

    with serving(answer_all) as url:
        yield url


def test_push_status_and_verify_agree(server: Server, checkpoint: Path, tmp_path: Path) -> None:
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
    assert f"digest of the checkpoint {report.digest}" in verified.output

    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    differing = weightcast("verify", server.url, "--checkpoint", tmp_path, token=server.token)
    assert differing.exit_code == 1
    assert f"different: {name}" in differing.output
    assert "1 different" in differing.output


@pytest.mark.parametrize(
    ("arch", "dtype"), [("qwen3_moe", "float32"), ("qwen3_moe", "bfloat16"), ("qwen3_tied", "float32")]
)
def test_verify_looks_at_what_is_live(arch: str, dtype: str, tmp_path: Path) -> None:
    """Fused experts and casts included: neither the names nor the type of live tensors are the checkpoint's."""
    folder = build_tiny_model(tmp_path / "m", arch, "bfloat16", seed=3)
    llm = AsyncLLM(folder, dtype=dtype, num_threads=1)
    with served(llm) as url, Publisher(folder, [url], timeout_s=30) as publisher:
        assert weightcast("verify", url, "--checkpoint", folder).exit_code == 0
        report = publisher.publish()
        verified = weightcast("verify", url, "--checkpoint", folder)
        assert verified.exit_code == 0, verified.output
        assert report.version in verified.output
        assert "not compared" not in verified.output
        name, tensor = next(
            item for item in llm.engine.model.named_parameters() if item[1].dim() == 3 or arch != "qwen3_moe"
        )
        llm.engine.run_between_steps(lambda: tensor.data.view(-1)[-1].neg_()).result(20)
        spoilt = weightcast("verify", url, "--checkpoint", folder)
        assert spoilt.exit_code == 1, (name, spoilt.output)
        assert "1 different" in spoilt.output


@pytest.mark.parametrize(
    ("dtype", "engine_dtype"), [(torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16"), (None, "bfloat16")], ids=str
)
def test_what_was_published_is_what_a_checkpoint_in_that_type_says(
    dtype: torch.dtype | None, engine_dtype: str, tmp_path: Path
) -> None:
    """float32 masters, a checkpoint saved in bfloat16, and engines of either type: equal, by digests that are equal."""
    folder = build_tiny_model(tmp_path / "m", "qwen3_moe", "float32")
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = AsyncLLM(folder, dtype=engine_dtype, num_threads=1)
    with served(llm) as url:
        for kind in ("module", "state dict", "module"):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.01)
            saved = {name: value.contiguous() for name, value in checkpoint_tensors(module).items()}
            source = module if kind == "module" else saved
            with Publisher(source, [url], dtype=dtype, timeout_s=30) as publisher:
                report = publisher.publish()
            rounded = tmp_path / f"{report.number}"
            rounded.mkdir()
            save_file({name: value.bfloat16() for name, value in saved.items()}, rounded / "model.safetensors")
            verified = weightcast("verify", url, "--checkpoint", rounded)
            assert verified.exit_code == 0, verified.output
            assert ("in the engine's types" in verified.output) == (engine_dtype != "bfloat16"), verified.output
            if dtype is not None:
                assert f"digest of the checkpoint {report.digest}" in verified.output
            save_file(saved, rounded / "model.safetensors")
            exact = weightcast("verify", url, "--checkpoint", rounded)
            assert (exact.exit_code == 0) == (engine_dtype == "bfloat16"), exact.output
            if dtype is not None:
                for name, value in saved.items():
                    saved[name] = value.bfloat16()
                with Publisher(saved, [url], timeout_s=30) as publisher:
                    again = publisher.publish()
                assert again.version.partition("-")[2] == report.version.partition("-")[2]
                assert again.digest == report.digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_content_has_one_digest_in_push_and_verify(dtype: str, tmp_path: Path) -> None:
    """Engines that cast hold other bytes, whose digests are not shown as those of what was published."""
    folder = build_tiny_model(tmp_path / "m", "qwen3", "bfloat16", seed=5)
    with served(AsyncLLM(folder, dtype=dtype, num_threads=1)) as url:
        pushed = weightcast("push", folder, "--to", url, "--quiet")
        verified = weightcast("verify", url, "--checkpoint", folder)
    assert (pushed.exit_code, verified.exit_code) == (0, 0), pushed.output + verified.output
    shown = [re.findall(r"\b[0-9a-f]{16}\b", ended.output) for ended in (pushed, verified)]
    assert shown[0] == shown[1], pushed.output + verified.output
    assert len(shown[0]) == 1, pushed.output
    assert ("equal, in the engine's types" in verified.output) == (dtype == "float32"), verified.output


def test_a_checkpoint_that_lacks_a_tensor_is_told_to_who_compares(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3", "float32", seed=6)
    tensors = load_file(folder / "model.safetensors")
    with served(AsyncLLM(folder, num_threads=1)) as url:
        tensors.pop("model.norm.weight")
        save_file(tensors, folder / "model.safetensors")
        refused = weightcast("verify", url, "--checkpoint", folder)
    assert refused.exit_code == 1
    assert "needs 1 tensor that the manifest lacks: model.norm.weight" in refused.output
    assert "Give the whole model" in refused.output
    assert "ublish" not in refused.output


@pytest.mark.parametrize("more", [{"num_hidden_layers": 4}, {"attention_bias": True}])
def test_half_of_a_model_is_neither_pushed_nor_called_equal(more: dict[str, object], tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3")
    whole = build_tiny_model(tmp_path / "whole", "qwen3", **more)
    pattern = "*.bias" if "attention_bias" in more else "model.layers.[23].*"
    llm = AsyncLLM(folder, num_threads=1)

    def live() -> dict[str, torch.Tensor]:
        tensors = dict(llm.engine.model.named_parameters())
        return llm.engine.run_between_steps(lambda: {name: t.detach().clone() for name, t in tensors.items()}).result(
            20
        )

    with served(llm) as url:
        before = live()
        refused = weightcast("push", whole, "--to", url)
        assert refused.exit_code == 1
        assert "PlanMismatch" in refused.output
        assert all(torch.equal(tensor, before[name]) for name, tensor in live().items())

        misspelt = weightcast("push", whole, "--to", url, "--unused", "no.such.*")
        assert misspelt.exit_code == 1
        assert "'no.such.*' matches none" in misspelt.output

        pushed = weightcast("push", whole, "--to", url, "--unused", pattern)
        assert pushed.exit_code == 0, pushed.output
        assert "matches what is live" not in pushed.output
        assert "tensors left out: model.layers" in pushed.output
        wanted = load_file(whole / "model.safetensors")
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in live().items())

        halved = weightcast("verify", url, "--checkpoint", whole)
        assert halved.exit_code == 1, halved.output
        assert "in the checkpoint, not held by the engine: model.layers" in halved.output
        assert "not proven equal" in halved.output
        told = weightcast("verify", url, "--checkpoint", whole, "--unused", pattern)
        assert told.exit_code == 0, told.output
        assert "equal, but for" in told.output
        assert weightcast("verify", url, "--checkpoint", whole, "--unused", "no.such.*").exit_code == 1

        report = json.loads(weightcast("push", whole, "--to", url, "--unused", pattern, "--json").stdout)
        assert set(report["unused"]) == set(wanted) - set(before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_verify_finds_merged_adapters_in_the_checkpoint_that_peft_makes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder, truth = build_tiny_model(tmp_path / "m", "qwen3_moe", "float32", seed=4), tmp_path / "truth"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    learning = torch.optim.AdamW((value for value in adapted.parameters() if value.requires_grad), lr=0.02)
    with served(AsyncLLM(folder, num_threads=1)) as url, Publisher(adapted, [url], timeout_s=30) as publisher:
        for _ in range(2):
            tokens = torch.randint(3, 60, (2, 8))
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            learning.step()
            publisher.publish()
            deepcopy(adapted).merge_and_unload().save_pretrained(truth)
            verified = weightcast("verify", url, "--checkpoint", truth)
            assert verified.exit_code == 0, verified.output
            assert "not compared" not in verified.output
        assert weightcast("verify", url, "--checkpoint", folder).exit_code == 1


def test_push_and_verify_under_other_names(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3")
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({f"base_model.model.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    llm = AsyncLLM(folder, num_threads=1)
    with served(llm) as url:
        refused = weightcast("push", tmp_path, "--to", url)
        assert refused.exit_code == 1
        assert "--rename base_model.model.=" in refused.output
        option = ("--rename", "base_model.model.=")
        assert weightcast("push", tmp_path, "--to", url, *option).exit_code == 0
        live = dict(llm.engine.model.named_parameters())
        assert all(torch.equal(value.detach(), tensors[name]) for name, value in live.items())
        assert weightcast("verify", url, "--checkpoint", tmp_path, *option).exit_code == 0
        assert weightcast("verify", url, "--checkpoint", tmp_path).exit_code == 1
        wrong = weightcast("push", tmp_path, "--to", url, "--rename", "base_model.model.")
        assert wrong.exit_code == 1
        assert "OLD=NEW" in wrong.output


def test_verify_of_a_checkpoint_that_lists_tied_tensors_twice(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3_tied")
    tensors = load_file(folder / "model.safetensors")
    with served(AsyncLLM(folder, num_threads=1)) as url:
        for change, code in ((0, 0), (1, 1)):
            twice = tmp_path / f"twice {change}"
            twice.mkdir()
            head = tensors["model.embed_tokens.weight"] + change
            save_file({**tensors, "lm_head.weight": head}, twice / "model.safetensors")
            verified = weightcast("verify", url, "--checkpoint", twice)
            assert verified.exit_code == code, verified.output
            pushed = weightcast("push", twice, "--to", url)
            assert pushed.exit_code == code, pushed.output
            assert "have different values" in pushed.output or not change


def test_verify_claims_nothing_that_it_did_not_see(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3")
    with served(ScriptedEngine()) as url:
        verified = weightcast("verify", url, "--checkpoint", folder)
    assert verified.exit_code == 1
    assert "not compared: head.weight" in verified.output
    assert "not proven equal" in verified.output


def test_verify_of_a_strange_answer(tmp_path: Path) -> None:
    """An answer that is no JSON, one that drips past the deadline, and another model's checkpoint end with one line."""
    folder = build_tiny_model(tmp_path / "m", "qwen3")
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot JSON!") as url:
        strange = weightcast("verify", url, "--checkpoint", folder)
    assert (strange.exit_code, strange.exception.__class__) == (1, SystemExit), strange.output
    assert "EngineError" in strange.output
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", drip_s=0.1) as url:
        late = weightcast("verify", url, "--checkpoint", folder, "--timeout", "1")
    assert "DeadlineExceeded" in late.output
    other = build_tiny_model(tmp_path / "other", "qwen3", hidden_size=32)
    with served(AsyncLLM(other, num_threads=1)) as url:
        mismatch = weightcast("verify", url, "--checkpoint", folder)
    assert mismatch.exit_code == 1
    assert "PlanMismatch" in mismatch.output


BAD_INDEX = {
    "no JSON": "{",
    "a list": "[]",
    "without a map": '{"metadata": {}}',
    "of numbers": '{"weight_map": {"a": 3}}',
    "empty": '{"weight_map": {}}',
    "of a file that is not there": '{"weight_map": {"a": "missing.safetensors"}}',
}


@pytest.mark.parametrize("index", BAD_INDEX)
def test_an_index_that_leads_nowhere(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(BAD_INDEX[index])
    for command in (
        ("push", tmp_path, "--to", "http://127.0.0.1:9"),
        ("verify", "http://127.0.0.1:9", "--checkpoint", tmp_path),
    ):
        result = weightcast(*command)
        assert (result.exit_code, result.exception.__class__) == (1, SystemExit), result.output
        assert "InvalidInput" in result.output
        assert "model.safetensors.index.json" in result.output


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:0",
        "http://a b:1",
        "http://[::1",
        f"http://{'x' * 70}.com:1",
        "http://b\u00fccher:1",
        "ftp://127.0.0.1:1",
    ],
)
def test_a_url_that_leads_nowhere(url: str, checkpoint: Path) -> None:
    for command in (("push", checkpoint, "--to", url), ("status", url), ("verify", url, "--checkpoint", checkpoint)):
        result = weightcast(*command)
        assert (result.exit_code, result.exception.__class__) == (1, SystemExit), result.output
        assert "InvalidInput: an engine is http://host:port" in result.output


def test_watch_on_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = weightcast("watch", "http://127.0.0.1:9", "--port", port)
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit), result.output
    assert f"cannot listen on port {port}" in result.output


def test_a_person_reads_the_push(server: Server, checkpoint: Path) -> None:
    pushed = weightcast("push", checkpoint, "--to", server.url, "--transport", "tcp", token=server.token)
    assert pushed.exit_code == 0, pushed.output
    assert "tcp" in pushed.output
    assert "matches what is live" in pushed.output


def test_wrong_token_changes_nothing(server: Server, checkpoint: Path) -> None:
    before = weightcast("status", server.url).output
    pushed = weightcast("push", checkpoint, "--to", server.url, token="wrong")
    assert pushed.exit_code == 1
    assert "AuthError" in pushed.output
    assert "Traceback" not in pushed.output
    refused = weightcast("verify", server.url, "--checkpoint", checkpoint, token="wrong")
    assert refused.exit_code == 1
    assert "AuthError" in refused.output
    assert weightcast("status", server.url).output == before


def test_status_says_who_cannot_be_reached(server: Server) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    shown = weightcast("status", server.url, gone)
    assert shown.exit_code == 1
    assert "PeerLost" in shown.output
    assert "ready" in shown.output


def test_a_folder_without_weights_is_refused(server: Server, tmp_path: Path) -> None:
    pushed = weightcast("push", tmp_path, "--to", server.url, token=server.token)
    assert pushed.exit_code == 1
    assert "no safetensors files" in pushed.output


class OnDevice:
    """As much of a transport as the choice of devices asks for."""

    def __init__(self, device: str) -> None:
        self._device = device

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        if trainer.pid == worker.pid:
            return "one process"
        return None if trainer.device == worker.device == self._device else "not this memory"


@pytest.mark.parametrize(
    ("device", "num_gpus", "expected"),
    [
        ("cpu", 0, ("cpu", "cpu")),
        ("cpu", 2, ("cpu", "cpu")),
        ("cuda", 0, ("cpu", "cpu")),
        ("cuda", 1, ("cuda:0", "cuda:0")),
        ("cuda", 2, ("cuda:0", "cuda:1")),
    ],
)
def test_doctor_tries_each_transport_where_it_moves_bytes(
    device: str, num_gpus: int, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(facts, "gpu_uuid", str)
    assert tuple(map(str, devices_for(OnDevice(device)))) == expected  # type: ignore[arg-type]


def test_a_tiny_run_of_the_demo_proves_every_round(tmp_path: Path) -> None:
    options = Options(
        iterations=3, num_prompts=8, group_size=8, warm_up=0.04, warm_up_steps=40, held_out=16, seed=92,
        report=tmp_path / "page.html",
    )  # fmt: skip
    verdict = run_demo(options, Console(quiet=True))
    assert verdict.passed, verdict
    assert '"Rounds proven by digest":{"text":"4 of 4","state":""}' in (tmp_path / "page.html").read_text(
        encoding="utf-8"
    )


def test_a_server_that_does_not_start_shows_its_last_words(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "nothing") as process:
        with pytest.raises(EngineError, match="ended with status"):
            process.wait_until_listening()
        pid = process.pid
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_no_server(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    demo = Forked(COMMAND, "demo", "--report", tmp_path / "page.html", environment=environment, log=tmp_path / "log")
    try:
        demo.wait_for("(process ")
        demo.wait_for("waits for weights")
        line = (tmp_path / "log").read_text()
        server = psutil.Process(int(line.partition("(process ")[2].partition(")")[0]))
        assert "serve" in server.cmdline()
        demo.send_signal(number)
        assert demo.wait(30) != 0
        end = time.monotonic() + 5
        while server.is_running() and time.monotonic() < end:
            time.sleep(0.05)
        assert not server.is_running()
    finally:
        demo.close()


def test_reports_of_pushes_are_json(server: Server, checkpoint: Path) -> None:
    pushed = weightcast("push", checkpoint, "--to", server.url, "--mode", "in_place", "--json", token=server.token)
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["mode"] == "in_place"
