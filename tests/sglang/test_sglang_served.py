"""A served SGLang: rounds while requests run, refusals, and what SGLang's own update routes do beside weightcast."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.sglang.reference import PROMPTS, Reference, replace
from tests.sglang.servers import Launcher, Server

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, PlanMismatch, WeightcastError
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

STORY = [3, 1, 4]
MIDWAY = 5
"""So many tokens of a request are there when the commit is ordered."""
NUM_TOKENS = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("served") / "m", "qwen3", dtype="float32")


@pytest.fixture(scope="module")
def server(launcher: Launcher, model: Path) -> Iterator[Server]:
    with launcher.server(model) as running:
        yield running


def test_the_control_routes_need_the_token(server: Server) -> None:
    assert server.get("/get_world_size").json() == {"world_size": 1}
    assert server.status["backend"] == "weightcast"
    for path in ("init", "commit", "rollback", "shutdown", "wake"):
        assert server.post(f"/weightcast/{path}", {}).status_code == 401
        assert server.post(f"/weightcast/{path}", {}, headers={"Authorization": "Bearer no"}).status_code == 401


def test_bad_input_is_422_and_the_wrong_moment_409(server: Server) -> None:
    before = server.answers(PROMPTS)
    order = {"epoch": 99, "round": 99, "version": "9-x", "timeout_s": 5}
    for path, body, code in (
        ("commit", order, 409),
        ("init", {"init_info": {"address": "tcp://127.0.0.1:1", "colour": "red"}}, 422),
        ("commit", {**order, "pause": "often"}, 422),
        ("commit", {**order, "colour": 1}, 422),
        ("wake", {}, 422),
    ):
        answer = server.post(f"/weightcast/{path}", body, headers=server.headers)
        assert answer.status_code == code, (path, body, answer.text)
    assert server.answers(PROMPTS) == before
    assert not server.status["paused"]


class OrderedMidway(HttpEngineClient):
    """Orders a commit when a request has begun to answer with the version before."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.url, token=server.token)
        self._server = server
        self._midway = threading.Event()
        self.busy = threading.Thread(target=self._ask)
        self.last: dict[str, object] = {}

    def _ask(self) -> None:
        for part in self._server.stream(STORY, NUM_TOKENS):
            self.last = part
            if len(part["output_ids"]) >= MIDWAY:
                self._midway.set()

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.busy.ident is None:
            self.busy.start()
            assert self._midway.wait(deadline.remaining_s()), "no tokens"
        return super().commit(order, deadline)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize(
    ("pause", "clear_cache"), [("keep", True), ("keep", False), ("none", False), ("wait", True), ("abort", True)]
)
def test_every_token_of_a_request_in_flight_is_of_the_version_it_names(
    server: Server, model: Path, mode: Literal["staged", "in_place"], pause: str, clear_cache: bool
) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
        first = publisher.publish()
    before = Reference(model, weights)
    replace(weights, model)
    client = OrderedMidway(server)
    with Publisher(weights, [client], timeout_s=60, mode=mode, pause=pause, clear_cache=clear_cache) as publisher:
        report = publisher.publish()
    client.busy.join(60)
    after = Reference(model, weights)
    meta = client.last["meta_info"]
    assert isinstance(meta, dict)
    tokens: list[int] = client.last["output_ids"]  # type: ignore[assignment]
    spans = [(span["version"], span["start"], span["end"]) for span in meta["weight_versions"]]
    if pause in ("wait", "abort"):
        assert [name for name, *_ in spans] == [first.version]
        assert tokens == before.next_tokens([*STORY, *tokens], len(STORY))
        assert meta["finish_reason"]["type"] == ("length" if pause == "wait" else "abort")
    else:
        assert [name for name, *_ in spans] == [first.version, report.version]
        assert len(tokens) == NUM_TOKENS == spans[1][2]
        cut = spans[0][2]
        assert MIDWAY <= cut == spans[1][1] < NUM_TOKENS
        whole = [*STORY, *tokens]
        assert tokens[:cut] == before.next_tokens(whole, len(STORY))[:cut]
        if clear_cache:
            assert tokens[cut:] == after.next_tokens(whole, len(STORY))[cut:]
    assert server.answers(PROMPTS) == after.answers()
    assert not server.status["paused"]


@pytest.mark.parametrize("trouble", ["unknown tensor", "wrong shape", "half a fused group", "missing tensor"])
def test_a_wrong_model_is_refused_before_anything_is_written(server: Server, model: Path, trouble: str) -> None:
    before, version = server.answers(PROMPTS), server.status["weight_version"]
    weights = random_state_dict(model)
    name = {
        "unknown tensor": "model.layers.0.no_such.weight",
        "wrong shape": "model.layers.0.mlp.down_proj.weight",
        "half a fused group": "model.layers.1.self_attn.k_proj.weight",
        "missing tensor": "model.norm.weight",
    }[trouble]
    if trouble == "unknown tensor":
        weights[name] = torch.randn(4, 4)
    elif trouble == "wrong shape":
        weights[name] = weights[name][:, :-2].contiguous()
    else:
        del weights[name]
    with (
        Publisher(weights, [server.url], token=server.token, timeout_s=30) as publisher,
        pytest.raises(WeightcastError) as caught,
    ):
        publisher.publish()
    shown = {"half a fused group": "qkv_proj", "wrong shape": "down_proj"}.get(trouble, name.rpartition(".weight")[0])
    assert shown in str(caught.value)
    assert isinstance(caught.value, PlanMismatch)
    assert server.answers(PROMPTS) == before
    assert server.status["weight_version"] == version


def test_sglangs_own_update_takes_the_version_with_it(server: Server, model: Path) -> None:
    weights = random_state_dict(model)
    other = Reference(model, random_state_dict(model))
    with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
        publisher.publish()
        server.load_from(other.checkpoint)
        assert server.answers(PROMPTS) == other.answers()
        assert (server.status["weight_version"], server.status["digest"]) == ("default", None)
        assert server.generate([7])["meta_info"]["weight_version"] == "default"
        replace(weights, model)
        report = publisher.publish()
        assert report.digests_match
        assert server.answers(PROMPTS) == Reference(model, weights).answers()
        assert server.version == server.status["weight_version"] == report.version


def test_a_wrong_token_is_told(server: Server, model: Path) -> None:
    with (
        Publisher(random_state_dict(model), [server.url], token="wrong", timeout_s=10) as publisher,
        pytest.raises(AuthError),
    ):
        publisher.connect()
