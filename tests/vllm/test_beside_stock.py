"""weightcast's routes beside vLLM's own: caches, versions on outputs, rounds through the stock routes, servers without ours."""

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.vllm.offline import FreshLoads

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import PlanMismatch
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.trainer.clients import CommitOrder, CommitReply, EngineClient, VllmDevClient

LONG = [(7 * n) % 200 + 3 for n in range(300)]
PROMPTS = [[5, 17, 33, 2, 90], [7]]
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("beside") / "m", "qwen3_tied", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    token_routes = ["--enable-scale-out"] if find_spec("vllm.entrypoints.launchers") else []
    with vllm_server(model, *token_routes, env=DEV_MODE, max_model_len=640, kv_cache_nbytes=64 << 20) as running:
        # The very first prompt is a single token: it must not need a warm-up.
        assert len(running.complete([7], max_tokens=3)["token_ids"]) == 3
        yield running


def test_cached_prefixes_do_not_outlive_their_weights(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], token=served.token) as publisher:
        publisher.publish()
        old = served.answers([LONG, LONG])
        assert old[0] == old[1]
        replace(weights, model)
        publisher.publish()
        assert served.answers([LONG, LONG]) == fresh.answers(model, weights, [LONG], max_model_len=640) * 2
    with Publisher(weights, [served.url], token=served.token, clear_cache=False) as publisher:
        replace(weights, model)
        publisher.publish()
        (stale,) = served.answers([LONG])
        (want,) = fresh.answers(model, weights, [LONG], max_model_len=640)
        assert stale != want, "without clear_cache the cached prefix is used"


def test_a_frozen_request_goes_on_with_the_new_weights(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    prompt, answers = [3, 1, 4, 1, 5], []
    request = {
        "token_ids": prompt,
        "sampling_params": {"temperature": 0, "max_tokens": 500, "ignore_eos": True, "logprobs": 0},
    }
    busy = threading.Thread(target=lambda: answers.append(served.post("/inference/v1/generate", request).json()))
    with Publisher(weights, [served.url], token=served.token) as publisher:
        old = publisher.publish().version
        replace(weights, model)
        before = tokens_made(served)
        busy.start()
        while tokens_made(served) < before + 5 and busy.is_alive():
            time.sleep(0.005)
        # Frozen by its own hand, however fast tokens come here: a round leaves a pause as it found it.
        assert served.post("/pause?mode=keep&clear_cache=false").status_code == 200
        new = publisher.publish().version
        assert served.get("/is_paused").json()["is_paused"]
        assert served.post("/resume").status_code == 200
    busy.join(60)
    if "choices" not in answers[0]:
        pytest.skip("this vLLM has no route for token ids")
    (choice,) = answers[0]["choices"]
    if "weight_versions" not in choice:
        pytest.skip("this vLLM does not say in its outputs which version made them")
    spans, tokens = choice["weight_versions"], choice["token_ids"]
    assert [(span["version"], span["start"] == 0) for span in spans] == [(old, True), (new, False)]
    assert spans[1]["start"] == spans[0]["end"]
    first = spans[1]["start"]
    room = 256 - len(prompt) - 12
    assert 0 < first < room, "the round came before the request, or long after it"
    ((after, _),) = fresh.answers(model, weights, [prompt + tokens[:first]])
    assert tokens[first : first + len(after)] == after


class StockRoutes(EngineClient):
    """Rounds by vLLM's own routes, as other trainers call them."""

    kind = "stock"
    host = "127.0.0.1"

    def __init__(self, served: Served) -> None:
        self.name, self._served = served.url, served

    def _post(self, path: str, body: Any = None) -> None:
        answer = self._served.post(path, body)
        assert answer.status_code == 200, answer.text

    def world_size(self, deadline: Deadline) -> int:
        return int(self._served.get("/get_world_size").json()["world_size"])

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        self._post(f"/pause?mode={order.pause}")
        self._update(order.epoch, order.round, "commit")
        self._post("/finish_weight_update", {"weight_version": order.version})
        self._post("/resume")
        return CommitReply()

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._update(epoch, round, "rollback")
        self._post("/finish_weight_update")

    def _update(self, epoch: int, round: int, action: str) -> None:
        self._post("/start_weight_update")
        self._post("/update_weights", {"update_info": {"epoch": epoch, "round": round, "action": action}})

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return dict(self._served.get("/weightcast/status").json())

    def shutdown(self, deadline: Deadline) -> None:
        self._post("/shutdown_weight_transfer_engine")


def test_the_stock_routes_carry_a_round(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [StockRoutes(served)]) as publisher:
        report = publisher.publish()
        assert report.digests_match
        assert served.version == report.version
        assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)


def test_the_stock_routes_survive_wrong_calls(served: Served) -> None:
    before, version = served.answers(PROMPTS), served.version
    served.post("/init_weight_transfer_engine", {"init_info": {"colour": "red"}})
    served.post("/start_weight_update")
    served.post("/update_weights", {"update_info": {"names": ["model.norm.weight"], "shapes": [[64]]}})
    served.post("/finish_weight_update")
    assert (served.answers(PROMPTS), served.version) == (before, version)


def test_a_server_that_was_paused_stays_paused(served: Served, model: Path) -> None:
    served.post("/pause?mode=keep")
    with Publisher(random_state_dict(model), [served.url], token=served.token) as publisher:
        version = publisher.publish().version
    assert served.get("/is_paused").json() == {"is_paused": True}
    served.post("/resume")
    assert served.version == version
    assert served.complete([5, 6], max_tokens=4)["finish_reason"] == "length"


def test_a_compiled_server_without_our_routes_is_reached_by_the_development_ones(model: Path, tmp_path: Path) -> None:
    """Compiled code computes a little differently: a fresh load is the server's own start."""
    config = tmp_path / "vllm.yaml"
    config.write_text(json.dumps({"weight-transfer-config": '{"backend": "weightcast"}'}))
    with vllm_server(model, "--config", str(config), "--no-enforce-eager", backend=(), env=DEV_MODE) as served:
        assert served.get("/weightcast/status").status_code == 404
        want = served.answers(PROMPTS)
        weights = random_state_dict(model)
        with Publisher(weights, [VllmDevClient(served.url)], timeout_s=60) as publisher:
            assert publisher.publish().digests_match
            assert served.answers(PROMPTS) != want
            for name, value in load_file(model / "model.safetensors").items():
                weights[name].copy_(value)
            report = publisher.publish()
            assert served.version == report.version
            assert served.answers(PROMPTS) == want
        del weights["model.layers.0.mlp.gate_proj.weight"]
        with (
            Publisher(weights, [VllmDevClient(served.url)]) as publisher,
            pytest.raises(PlanMismatch, match="gate_up_proj"),
        ):
            publisher.publish()
        assert (served.answers(PROMPTS), served.version) == (want, report.version)


def tokens_made(served: Served) -> float:
    """Tokens that the server has generated since it started."""
    found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", served.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


def replace(weights: dict[str, Any], model: Path) -> None:
    """Fresh random values for all of them."""
    for name, value in random_state_dict(model).items():
        weights[name].copy_(value)
