"""The main job with real processes: a served engine, a trainer that publishes, and a trainer that dies in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import transformers

from weightcast import Publisher
from weightcast.errors import AuthError
from weightcast.testing.models import build_tiny_model

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

PROMPT = [5, 6, 7, 8, 9]
TOKEN = "a-token-for-this-test"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ready = tmp_path_factory.mktemp("serve") / "url"
    command = [sys.executable, "-m", "weightcast.cli", "serve", str(checkpoint), "--port", "0", "--token", TOKEN]
    command += ["--dtype", "float32", "--device", "cpu", "--served-model-name", "policy", "--ready-file", str(ready)]
    server = subprocess.Popen(command)
    try:
        end = time.monotonic() + 90
        while not (ready.exists() and ready.read_text().strip()):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
        yield ready.read_text().strip()
    finally:
        server.terminate()
        try:
            assert server.wait(20) == 0
        finally:
            server.kill()


@pytest.fixture
def policy(checkpoint: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def train(model: torch.nn.Module) -> None:
    """Stands for an optimizer step: fresh random changes to every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def expected(model: transformers.PreTrainedModel, num_tokens: int = 12) -> list[int]:
    output = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return output[0, len(PROMPT) :].tolist()


def served(url: str, num_tokens: int = 12) -> dict:
    body = {"model": "policy", "prompt": PROMPT, "max_tokens": num_tokens, "min_tokens": num_tokens, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json={**body, "return_token_ids": True}, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_the_server_generates_with_each_published_version(
    url: str, policy: transformers.PreTrainedModel, transport: str, mode: str
) -> None:
    with Publisher(policy, [url], token=TOKEN, transport=transport, mode=mode) as publisher:
        publisher.connect()
        for _ in range(2):
            train(policy)
            report = publisher.publish()
            assert report.digests_match
            choice = served(url)
            assert choice["token_ids"] == expected(policy)
            assert choice["weight_versions"] == [{"version": report.version, "start": 0, "end": 12}]
            assert httpx.get(f"{url}/weight_info").json()["weight_version"] == report.version


def test_requests_in_flight_go_on_over_a_commit(url: str, policy: transformers.PreTrainedModel) -> None:
    with Publisher(policy, [url], token=TOKEN) as publisher:
        publisher.publish()
        choices: list[dict] = []
        threads = [threading.Thread(target=lambda: choices.append(served(url, 400))) for _ in range(4)]
        for thread in threads:
            thread.start()
        reports = []
        while any(thread.is_alive() for thread in threads):
            train(policy)
            reports.append(publisher.publish())
            time.sleep(0.05)
        for thread in threads:
            thread.join()
    known = {report.version for report in reports}
    for choice in choices:
        spans = choice["weight_versions"]
        assert len(choice["token_ids"]) == 400
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert spans[-1]["end"] == 400
        assert {span["version"] for span in spans[1:]} <= known
    assert any(len(choice["weight_versions"]) > 1 for choice in choices)


def test_a_wrong_token_changes_nothing(url: str, policy: transformers.PreTrainedModel) -> None:
    before = served(url)["token_ids"]
    train(policy)
    with Publisher(policy, [url], token="another") as publisher, pytest.raises(AuthError):
        publisher.publish()
    assert served(url)["token_ids"] == before


TRAINER = """
import sys, torch, transformers
from weightcast import Publisher
import weightcast.transports.{transport} as module

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with Publisher(model, [sys.argv[2]], token=sys.argv[3], transport="{transport}", mode="staged", silence_s=2.0) as publisher:
    publisher.connect()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    import weightcast.trainer.rounds as rounds
    # The bytes are on the worker, or on their way; the commit never comes.
    rounds.Round._verify = lambda self, *rest: (print("staged", flush=True), sys.stdin.read())
    publisher.publish()
"""


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_trainer_killed_in_a_staged_round_leaves_version_n(
    url: str, policy: transformers.PreTrainedModel, checkpoint: Path, transport: str
) -> None:
    with Publisher(policy, [url], token=TOKEN, transport=transport) as publisher:
        train(policy)
        version = publisher.publish().version
    script = TRAINER.format(transport=transport)
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(checkpoint), url, TOKEN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline().strip() == "staged"
        os.kill(trainer.pid, signal.SIGKILL)
        choice = served(url)
        assert choice["token_ids"] == expected(policy)
        assert choice["weight_versions"][0]["version"] == version
    finally:
        trainer.kill()
        trainer.communicate()
    train(policy)
    with Publisher(policy, [url], token=TOKEN, transport=transport, takeover=True) as publisher:
        report = publisher.publish()
        assert report.number == int(version.partition("-")[0]) + 1
        assert served(url)["token_ids"] == expected(policy)
