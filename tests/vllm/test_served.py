"""A served vLLM: what a checkpoint proves of live weights, and what the log says of rounds (test_vllm_suite.py has the rest)."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.vllm.offline import FreshLoads
from tests.vllm.weights import replace, verified

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import PlanMismatch
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("served") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    # Engines of this process are quieter than the server that is asked for its log.
    log = {"VLLM_LOGGING_LEVEL": "INFO"}
    with vllm_server(model, env=log, max_model_len=1024, kv_cache_nbytes=64 << 20) as running:
        yield running


def test_vllms_own_routes_of_its_development_mode_are_not_needed(served: Served) -> None:
    assert served.post("/start_weight_update").status_code == 404


def test_live_weights_are_those_of_a_checkpoint(served: Served, model: Path, fresh: FreshLoads) -> None:
    weights = random_state_dict(model)
    before = verified(served, model, weights)
    assert not before.proven
    assert set(before.unproven) == set(weights), "vLLM keeps nothing of what it loaded but packed"
    for mode in ("staged", "in_place"):
        with Publisher(weights, [served.url], token=served.token, mode=mode, timeout_s=60) as publisher:
            replace(weights, model)
            report = publisher.publish()
        assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)
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
