"""weightcast's routes beside vLLM's own: caches, versions on outputs, rounds through the stock routes, servers without ours."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.vllm.joining import WAYS, Way, requests_go_on_meanwhile
from tests.vllm.offline import FreshLoads
from tests.vllm.stock import DEV_MODE, NAMES_VERSIONS, StockRoutes
from tests.vllm.weights import fill, replace

from weightcast import Publisher
from weightcast.errors import PlanMismatch
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.trainer.clients import VllmDevClient

LONG = [(7 * n) % 200 + 3 for n in range(300)]
PROMPTS = [[5, 17, 33, 2, 90], [7]]
MAX_LEN = 2048
"""A request that is watched while it runs must not be over before somebody looks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("beside") / "m", "qwen3_tied", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    token_routes = ["--enable-scale-out"] if find_spec("vllm.entrypoints.launchers") else []
    with vllm_server(model, *token_routes, env=DEV_MODE, max_model_len=MAX_LEN, kv_cache_nbytes=64 << 20) as running:
        # The very first prompt is a single token: it must not need a warm-up.
        assert len(running.complete([7], max_tokens=3)["token_ids"]) == 3
        yield running


@pytest.mark.parametrize("way", WAYS)
def test_requests_go_on_while_a_trainer_does_not_answer(served: Served, way: Way) -> None:
    requests_go_on_meanwhile(served, way)


def test_cached_prefixes_do_not_outlive_their_weights(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], token=served.token) as publisher:
        publisher.publish()
        old = served.answers([LONG, LONG])
        assert old[0] == old[1]
        replace(weights, model)
        publisher.publish()
        assert served.answers([LONG, LONG]) == fresh.answers(model, weights, [LONG], max_model_len=MAX_LEN) * 2
    with Publisher(weights, [served.url], token=served.token, clear_cache=False) as publisher:
        replace(weights, model)
        publisher.publish()
        (stale,) = served.answers([LONG])
        (want,) = fresh.answers(model, weights, [LONG], max_model_len=MAX_LEN)
        assert stale != want, "without clear_cache the cached prefix is used"


def test_a_frozen_request_goes_on_with_the_new_weights(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    prompt = [3, 1, 4, 1, 5]
    room = MAX_LEN - len(prompt) - 48
    with Publisher(weights, [served.url], token=served.token) as publisher:
        old = publisher.publish().version
        replace(weights, model)
        # Frozen by its own hand, however fast tokens come here: a round leaves a pause as it found it.
        with _frozen(served, prompt, room) as answers:
            new = publisher.publish().version
            assert served.get("/is_paused").json()["is_paused"]
    if not NAMES_VERSIONS:
        pytest.skip("vLLM before 0.32 does not say in its outputs which version made them")
    (choice,) = answers[0]["choices"]
    spans, tokens = choice["weight_versions"], choice["token_ids"]
    assert [(span["version"], span["start"] == 0) for span in spans] == [(old, True), (new, False)]
    assert spans[1]["start"] == spans[0]["end"]
    first = spans[1]["start"]
    assert 0 < first < MAX_LEN - len(prompt) - 12, "the round came before the request, or long after it"
    ((after, _),) = fresh.answers(model, weights, [prompt + tokens[:first]], max_model_len=MAX_LEN)
    assert tokens[first : first + len(after)] == after


@contextmanager
def _frozen(served: Served, prompt: list[int], room: int) -> Iterator[list[Any]]:
    """The server paused within the first ``room`` tokens of a long answer, which is in the list once the block has ended.

    An answer that was over before the pause is asked for again: on busy cores a caller may wait for seconds.
    """
    request = {
        "token_ids": prompt,
        "sampling_params": {"temperature": 0, "max_tokens": 2000, "ignore_eos": True, "logprobs": 0},
    }
    for _ in range(10):
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda into=answers: into.append(served.post("/inference/v1/generate", request).json())
        )
        before = served.tokens_made()
        asking.start()
        while served.tokens_made() < before + 5 and asking.is_alive():
            time.sleep(0.005)
        assert served.post("/pause?mode=keep&clear_cache=false").status_code == 200
        try:
            caught = served.tokens_made() < before + room
            if caught:
                yield answers
        finally:
            assert served.post("/resume").status_code == 200
            asking.join(60)
        if caught:
            return
    pytest.fail("no answer was slow enough to be paused while it was made")


def test_the_stock_routes_carry_a_round(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [StockRoutes(served)]) as publisher:
        report = publisher.publish()
        assert report.digests_match
        assert served.version == report.version
        assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)


def test_a_client_that_died_with_an_update_open_holds_nobody_up(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    with Publisher(random_state_dict(model), [StockRoutes(served)]) as died:
        died.publish()
        assert served.post("/start_weight_update").status_code == 200
        assert served.post("/start_weight_update").status_code == 424, "nobody finishes the update"
        with Publisher(weights, [StockRoutes(served)], takeover=True) as publisher:
            report = publisher.publish()
            assert served.version == report.version
    assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)


def test_the_stock_routes_survive_wrong_calls(served: Served, model: Path) -> None:
    with Publisher(random_state_dict(model), [served.url], token=served.token) as publisher:
        publisher.publish()
        before, version = served.answers(PROMPTS), served.version
        answer = served.post("/init_weight_transfer_engine", {"init_info": {"colour": "red"}})
        assert answer.status_code == 422, answer.text
        answer = served.post("/start_weight_update")
        assert answer.status_code == 200, answer.text
        answer = served.post("/start_weight_update")
        assert (answer.status_code, "already active" in answer.text) == (424, True), "vLLM's own worker raises"
        update = {"names": ["model.norm.weight"], "shapes": [[64]]}
        answer = served.post("/update_weights", {"update_info": update})
        assert answer.status_code == 422, answer.text
        finished = served.post("/finish_weight_update", {"weight_version": "of nothing"})
        assert finished.status_code == 422, finished.text
        assert (served.answers(PROMPTS), served.version) == (before, version)


def test_a_failed_update_is_not_named(served: Served, model: Path) -> None:
    with Publisher(random_state_dict(model), [served.url], token=served.token) as publisher:
        version = publisher.publish().version
        assert served.get("/weight_info").json()["weight_version"] == version
        assert served.post("/pause?mode=keep").status_code == 200
        assert served.post("/start_weight_update").status_code == 200
        update = {"update_info": {"epoch": 99, "round": 99, "action": "commit", "timeout_s": 1}}
        assert served.post("/update_weights", update).status_code == 424
        answer = served.post("/finish_weight_update", {"weight_version": "no-such"})
        assert answer.status_code == 424, answer.text
        assert answer.json()["error"]["type"] == "DeadlineExceeded"
        assert served.get("/weight_info").json()["weight_version"] == version
        assert served.get("/weightcast/status").json()["weight_version"] == version
        assert served.post("/resume").status_code == 200
        assert publisher.publish().digests_match


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
            fill(weights, load_file(model / "model.safetensors"))
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
