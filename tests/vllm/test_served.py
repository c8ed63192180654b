"""A served vLLM: rounds while requests run, refusals, failures and a killed trainer leave exactly version n."""

import re
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
from tests.vllm.offline import FreshLoads
from tests.vllm.weights import replace, verified

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, PlanMismatch, WeightcastError
from weightcast.testing.doomed_trainer import MOMENTS
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]
STORY = [3, 1, 4]
MIDWAY = 5
"""So many tokens of a request are there when the commit is ordered."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("served") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    # Engines of this process are quieter than the server that is asked for its log.
    log = {"VLLM_LOGGING_LEVEL": "INFO"}
    with vllm_server(model, env=log, max_model_len=2048, kv_cache_nbytes=64 << 20) as running:
        yield running


def test_the_control_routes_need_the_token_and_no_development_mode(served: Served) -> None:
    assert served.get("/get_world_size").json() == {"world_size": 1}
    assert served.get("/weightcast/status").json()["backend"] == "weightcast"
    assert served.post("/start_weight_update").status_code == 404
    for path in ("init", "commit", "rollback", "shutdown"):
        assert served.post(f"/weightcast/{path}", {}).status_code == 401
        assert served.post(f"/weightcast/{path}", {}, headers={"Authorization": "Bearer no"}).status_code == 401


def test_bad_input_is_422_and_the_wrong_moment_409(served: Served) -> None:
    def post(path: str, body: object) -> httpx.Response:
        return served.post(f"/weightcast/{path}", body, headers=served.headers)

    before = served.answers(PROMPTS)
    order = {"epoch": 99, "round": 99, "version": "9-x", "timeout_s": 5}
    assert post("commit", order).status_code == 409
    answer = post("init", {"init_info": {"address": "tcp://127.0.0.1:1", "colour": "red"}})
    assert answer.status_code == 422
    answer = post("commit", {**order, "pause": "often"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "pause")
    answer = post("commit", {**order, "colour": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "colour")
    assert served.answers(PROMPTS) == before


def test_a_round_is_one_line_in_vllms_log_and_an_orderly_end_no_warning(served: Served, model: Path) -> None:
    before = len(served.log.read_bytes())
    with Publisher(
        random_state_dict(model), [served.url], token=served.token, transport="tcp", timeout_s=60
    ) as publisher:
        versions = [publisher.publish().version for _ in range(3)]
    deadline = Deadline(30)
    while "the trainer left" not in (text := served.log.read_bytes()[before:].decode()):
        deadline.check("the line about the trainer that closed")
        time.sleep(0.05)
    form = r"\(\w*Worker\w* pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[receiver.py:\d+\] version (\S+) is live: "
    assert re.findall(f"^{form}[1-9]\\d* bytes by tcp in \\d+\\.\\d+ s, applied in .*$", text, re.MULTILINE) == versions
    assert text.count(" is live") == len(versions)
    assert not re.search("WARNING|ERROR|CRITICAL", text), text


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_rounds_arrive_while_requests_run(
    served: Served, model: Path, fresh: FreshLoads, transport: str, mode: str
) -> None:
    weights = random_state_dict(model)
    results: list[dict[str, object]] = []
    busy = [
        threading.Thread(target=lambda n=n: results.append(served.complete([n, n + 1, n + 2], max_tokens=200)))
        for n in range(3)
    ]
    with Publisher(
        weights, [served.url], token=served.token, transport=transport, mode=mode, timeout_s=60
    ) as publisher:
        publisher.connect()
        for thread in busy:
            thread.start()
        first = publisher.publish()
        replace(weights, model)
        report = publisher.publish()
        assert report.number == first.number + 1
        assert report.digests_match
        assert served.version == report.version
    for thread in busy:
        thread.join(60)
    assert [result["finish_reason"] for result in results] == ["length"] * 3
    assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)


def test_live_weights_are_those_of_a_checkpoint(model: Path) -> None:
    weights = random_state_dict(model)
    with vllm_server(model) as served:
        before = verified(served, model, weights)
        assert not before.proven
        assert set(before.unproven) == set(weights), "vLLM keeps nothing of what it loaded but packed"
        for mode in ("staged", "in_place"):
            with Publisher(weights, [served.url], token=served.token, mode=mode, timeout_s=60) as publisher:
                replace(weights, model)
                report = publisher.publish()
            # A checkpoint's order is not the trainer's.
            found = verified(served, model, dict(sorted(weights.items(), reverse=True)))
            assert (found.version, found.proven, set(found.equal)) == (report.version, True, set(weights))
            other = {name: value.clone() for name, value in weights.items()}
            spoilt = {
                "model.layers.1.self_attn.k_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
                "model.norm.weight",
            }
            for name in spoilt:
                other[name].view(-1)[-1] += 1
            found = verified(served, model, other)
            assert set(found.different) == spoilt
            assert set(found.equal) == set(weights) - spoilt
        found = verified(served, model, {**weights, "lm_head.bias": torch.randn(3)})
        assert (found.proven, found.absent) == (False, ("lm_head.bias",))
        del other["model.norm.weight"]
        with pytest.raises(PlanMismatch, match="nothing of it"):
            verified(served, model, other)


@pytest.mark.parametrize("trouble", ["unknown tensor", "wrong shape", "half a fused group", "missing tensor"])
def test_a_wrong_model_is_refused_before_anything_is_written(served: Served, model: Path, trouble: str) -> None:
    before, version = served.answers(PROMPTS), served.version
    weights = random_state_dict(model)
    names = {
        "unknown tensor": "model.layers.0.no_such.weight",
        "wrong shape": "model.layers.0.mlp.down_proj.weight",
        "half a fused group": "model.layers.1.self_attn.k_proj.weight",
        "missing tensor": "model.norm.weight",
    }
    name = names[trouble]
    if trouble == "unknown tensor":
        weights[name] = torch.randn(4, 4)
    elif trouble == "wrong shape":
        weights[name] = weights[name][:, :-2].contiguous()
    else:
        del weights[name]
    with (
        Publisher(weights, [served.url], token=served.token, timeout_s=30) as publisher,
        pytest.raises(WeightcastError) as caught,
    ):
        publisher.publish()
    shown = {"half a fused group": "qkv_proj", "wrong shape": "down_proj"}.get(trouble, name.rpartition(".weight")[0])
    assert shown in str(caught.value)
    assert served.answers(PROMPTS) == before
    assert served.version == version


@pytest.mark.parametrize("moment", [moment for moment, served in MOMENTS.items() if served == "before"])
def test_a_killed_trainer_leaves_version_n_and_another_can_publish(served: Served, model: Path, moment: str) -> None:
    with Publisher(random_state_dict(model), [served.url], token=served.token, timeout_s=60) as publisher:
        version = publisher.publish().version
    before = served.answers(PROMPTS)
    command = [sys.executable, "-m", "weightcast.testing.doomed_trainer", str(model), served.url, served.token, moment]
    assert subprocess.run(command, timeout=90).returncode == -signal.SIGKILL
    assert (served.answers(PROMPTS), served.version) == (before, version)
    with Publisher(random_state_dict(model), [served.url], token=served.token, timeout_s=60) as publisher:
        end = time.monotonic() + 20
        while True:
            try:
                report = publisher.publish()
                break
            except WeightcastError:
                assert time.monotonic() < end
                time.sleep(0.5)
    assert served.version == report.version
    assert served.answers(PROMPTS) != before


class OrderedMidway(HttpEngineClient):
    """Orders a commit when a request has begun to answer with the version before."""

    def __init__(self, served: Served, num_tokens: int) -> None:
        super().__init__(served.url, token=served.token)
        self._served, self._num_tokens = served, num_tokens
        self._midway = threading.Event()
        self.busy = threading.Thread(target=self._ask)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    def _ask(self) -> None:
        for choice in self._served.stream(STORY, self._num_tokens):
            self.tokens += choice["token_ids"] or []
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if len(self.tokens) >= MIDWAY:
                self._midway.set()

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.busy.ident is None:
            self.busy.start()
            assert self._midway.wait(deadline.remaining_s()), "no tokens"
            assert len(self.tokens) < self._num_tokens, "the request was over before the order"
        return super().commit(order, deadline)


@pytest.mark.parametrize("pause", ["keep", "wait", "abort", "none"])
def test_pause_modes(served: Served, model: Path, pause: str) -> None:
    """What the version before had answered begins every answer; what follows is of the new one, of the old one, or nothing."""
    num_tokens = 900 if pause == "wait" else 1900  # on a busy machine many are made before the order arrives
    old = served.complete(STORY, num_tokens)["token_ids"]
    client = OrderedMidway(served, num_tokens)
    with Publisher(random_state_dict(model), [client], pause=pause, timeout_s=60) as publisher:
        report = publisher.publish()
    client.busy.join(60)
    assert served.version == report.version
    assert not served.get("/weightcast/status").json()["paused"]
    tokens = client.tokens
    assert tokens[:MIDWAY] == old[:MIDWAY]
    assert client.finish_reason == ("abort" if pause == "abort" else "length")
    if pause == "wait":
        assert tokens == old
    elif pause == "abort":
        assert len(tokens) < num_tokens
        assert tokens == old[: len(tokens)]
    else:
        assert len(tokens) == num_tokens
        assert tokens != old
    assert served.complete(STORY, 40)["token_ids"] != old[:40]


def test_a_wrong_token_is_told(served: Served, model: Path) -> None:
    with (
        Publisher(random_state_dict(model), [served.url], token="wrong", timeout_s=10) as publisher,
        pytest.raises(AuthError),
    ):
        publisher.connect()
