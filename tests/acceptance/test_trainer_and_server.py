"""The main job with real processes: a served engine, a trainer that publishes, and a trainer that dies in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tests.support.forked import COMMAND, Forked

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, WeightcastError
from weightcast.testing.models import build_tiny_model
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.clients.base import CommitOrder, CommitReply

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

PROMPT = [5, 6, 7, 8, 9]
TOKEN = "a-token-for-this-test"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ready = tmp_path_factory.mktemp("serve") / "url"
    arguments = ["serve", checkpoint, "--port", 0, "--token", TOKEN, "--dtype", "float32", "--device", "cpu"]
    arguments += ["--served-model-name", "policy", "--ready-file", ready]
    server = Forked(COMMAND, *arguments, environment=os.environ)
    try:
        end = time.monotonic() + 90
        while not (ready.exists() and ready.read_text().strip()):
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
        yield ready.read_text().strip()
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            assert server.wait(20) == 0
        finally:
            server.close()


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


@pytest.mark.parametrize("transport", ["shm", "tcp"])
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
import signal, sys, torch, transformers
from weightcast import Publisher
from weightcast.trainer.round.round import Round
from weightcast.transports.connection import Connection

checkpoint, url, token, transport, where = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
publisher = Publisher(
    model, [url], token=token, transport=transport, mode="staged", bucket_nbytes=65536, silence_s=2.0
)
publisher.connect()
torch.manual_seed(1)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter))

def stop(*rest):
    print(where, flush=True)
    signal.pause()

sent = []

def send_some(self, *rest):
    sent.append(rest)
    return stop() if len(sent) == 4 else send(self, *rest)

if where == "transfer":
    # Three buckets are on the worker or on their way; it waits for the fourth.
    send, Connection.send = Connection.send, send_some
else:
    # The bytes are on the worker; the commit never comes.
    Round._verify = stop
publisher.publish()
"""


@pytest.mark.parametrize(("transport", "where"), [("tcp", "transfer"), ("tcp", "verify"), ("shm", "verify")])
def test_a_trainer_killed_in_a_staged_round_leaves_version_n(
    url: str, policy: transformers.PreTrainedModel, checkpoint: Path, transport: str, where: str
) -> None:
    """The next trainer needs no permission to take over from a dead one."""
    with Publisher(policy, [url], token=TOKEN, transport=transport) as publisher:
        train(policy)
        version = publisher.publish().version
    trainer = Forked(TRAINER, checkpoint, url, TOKEN, transport, where, environment=os.environ)
    try:
        trainer.wait_for(f"{where}\n")
        trainer.kill()
        choice = served(url)
        assert choice["token_ids"] == expected(policy)
        assert choice["weight_versions"][0]["version"] == version
    finally:
        trainer.close()
    train(policy)
    with Publisher(policy, [url], token=TOKEN, transport=transport) as publisher:
        report = publisher.publish()
        assert report.number == int(version.partition("-")[0]) + 1
        assert served(url)["token_ids"] == expected(policy)


class RlRoutesClient(HttpEngineClient):
    """Drives an engine by vLLM's RL routes only, as a trainer written for vLLM does."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(url, token=token)
        self.label: str | None = None
        """What the next finish calls the version; None: as the publisher does."""

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._call("POST", "/init_weight_transfer_engine", deadline, {"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        self._call("POST", "/pause?mode=keep&clear_cache=true", deadline)
        try:
            self._round("commit", order.epoch, order.round, deadline, self.label or order.version)
        finally:
            self._call("POST", "/resume", deadline)
        return CommitReply()

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._round("rollback", epoch, round, deadline, None)

    def shutdown(self, deadline: Deadline) -> None:
        self._call("POST", "/shutdown_weight_transfer_engine", deadline)

    def _round(self, action: str, epoch: int, round: int, deadline: Deadline, version: str | None) -> None:
        info = {"epoch": epoch, "round": round, "action": action}
        self._call("POST", "/start_weight_update", deadline, {})
        self._call("POST", "/update_weights", deadline, {"update_info": info})
        self._call("POST", "/finish_weight_update", deadline, {"weight_version": version})


class Posts:
    """The server's routes called by hand."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, path: str, body: Any = None, status: int = 200) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(self._url + path, json=body, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    def param(self, path: str, body: Any) -> str | None:
        """The field that is refused."""
        return self(path, body, 422)["error"]["param"]


def test_the_rl_routes_carry_rounds(url: str, policy: transformers.PreTrainedModel) -> None:
    client, post = RlRoutesClient(url, TOKEN), Posts(url)
    with Publisher(policy, [client], timeout_s=60, takeover=True) as publisher:
        checksums = []
        for _ in range(2):
            train(policy)
            report = publisher.publish()
            assert report.digests_match
            choice = served(url)
            assert choice["token_ids"] == expected(policy)
            assert choice["weight_versions"] == [{"version": report.version, "start": 0, "end": 12}]
            checksums.append(post("/weight_checker", {"action": "checksum"})["checksums"])
        assert post("/weight_checker", {"action": "compare", "baseline": checksums[1]})["match"]
        compared = post("/weight_checker", {"action": "compare", "baseline": checksums[0]})
        assert set(compared["mismatches"]) == set(checksums[0]), "every parameter was trained"
        assert httpx.get(f"{url}/weight_info").json() == {"weight_version": report.version, "digest": report.digest}

        # What moves no weights in the middle of a stay.
        slow = threading.Thread(target=lambda: aborted.append(served(url, 1500)))
        aborted: list[dict] = []
        slow.start()
        while not post("/abort_requests", {})["aborted"]:
            assert slow.is_alive()
        slow.join(60)
        assert aborted[0]["finish_reason"] == "abort"
        assert post("/reset_prefix_cache?reset_running_requests=true") == {"success": True}
        post("/start_weight_update")
        post("/finish_weight_update", {"weight_version": "bogus"}, 409)
        post("/start_weight_update")
        post("/update_weights", {"update_info": {"epoch": 999, "round": 999, "timeout_s": 0.2}}, 424)
        post("/finish_weight_update", None, 409)
        assert post.param("/update_weights", {"update_info": {"epoch": -1, "round": 1}}) == "update_info.epoch"
        assert served(url)["token_ids"] == expected(policy)

        # Out and in again: the trainer is told, joins anew, and rounds go on.
        client.label = "named-by-the-client"
        post("/shutdown_weight_transfer_engine")
        train(policy)
        with suppress(WeightcastError):
            publisher.publish()
        report = publisher.publish()
        assert report.digests_match
        assert served(url)["token_ids"] == expected(policy)
        assert httpx.get(f"{url}/weight_info").json()["weight_version"] == "named-by-the-client"
    post("/update_weight_version", {"new_version": "renamed"})
    assert served(url)["weight_versions"][0]["version"] == "renamed"
    assert post.param("/init_weight_transfer_engine", {"init_info": {"address": "tcp://h:1"}}) == "init_info.public_key"
    assert post.param("/init_weight_transfer_engine", {"init_info": {"nope": 1}}) in (
        "init_info.nope",
        "init_info.address",
    )
