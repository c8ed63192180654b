"""Models to speculate with inside stock vLLM on a GPU, with CUDA graphs and both of vLLM's model runners: of their target's version."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_vllm import DIMENSIONS, answers, engine, tiny_model

from weightcast import Publisher
from weightcast.errors import PlanMismatch
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]

NUM_DRAFTED = 3
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of vLLM's model runners serves: vLLM chooses by this variable."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if request.param == "v2" else "0")
    return str(request.param)


def worker_of(llm: Any) -> Any:
    worker = llm.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker)


def check_runner(llm: Any, runner: str) -> None:
    in_v2 = type(worker_of(llm).model_runner).__module__.startswith("vllm.v1.worker.gpu.")
    assert in_v2 is (runner == "v2"), os.environ["VLLM_USE_V2_MODEL_RUNNER"]


def counts(llm: Any) -> tuple[float, float]:
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def accepted(llm: Any) -> tuple[list[list[int]], float]:
    """Greedy tokens, and the share of drafted tokens that were accepted while they were made."""
    before, got, after = counts(llm), answers(llm), counts(llm)
    return got, (after[1] - before[1]) / (after[0] - before[0])


def assert_live(model: Any, values: Mapping[str, torch.Tensor], prefix: str = "model.") -> None:
    """All that a model of this checkpoint has of its own, compared by value, where vLLM's kernels read it."""
    live = dict(model.named_parameters())
    fused = {
        "self_attn.qkv_proj": [f"self_attn.{name}_proj" for name in "qkv"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    }
    seen = 0
    for name, tensor in live.items():
        stem, _, kind = name.rpartition(".")
        parts = next((parts for own, parts in fused.items() if stem.endswith(own)), None)
        if parts is not None:
            root = stem[: -len(next(own for own in fused if stem.endswith(own)))]
            sources = [f"{root}{part}.{kind}" for part in parts]
        else:
            sources = [name]
        given = [source if source in values else source.removeprefix(prefix) for source in sources]
        if all(source in values for source in given):
            wanted = torch.cat([values[source] for source in given]).to(tensor.device)
            assert torch.equal(tensor[: len(wanted)], wanted), name
            seen += len(given)
    assert seen >= len(values) - 1, "every published tensor was looked at, but for a tied head"


def fresh_head(path: Path) -> Weights:
    """An EAGLE head without embeddings and output head of its own."""
    given = {name.removeprefix("model."): value for name, value in random_state_dict(path).items()}
    layer = {name: value for name, value in given.items() if "layers.0." in name and "input_layernorm" not in name}
    return {**layer, "fc.weight": torch.randn(256, 512).mul(0.05).bfloat16()}


@torch.no_grad()
def fill(weights: Weights, values: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(values[name])


def on_gpu(weights: Weights) -> Weights:
    return {name: value.cuda() for name, value in weights.items()}


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("runner", ["v1"], indirect=True)
def test_a_draft_model(tmp_path: Path, runner: str, mode: str) -> None:
    """vLLM's second model runner refuses this method at start."""
    path, draft = tiny_model(tmp_path / "m", "qwen3"), tiny_model(tmp_path / "d", "qwen3")
    weights, of_draft = on_gpu(random_state_dict(path)), on_gpu(random_state_dict(draft))
    how = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTED}
    seen = []
    with engine(path, speculative_config=how, disable_log_stats=False) as llm:
        check_runner(llm, runner)
        with Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60, mode=mode) as publisher:
            for is_alike in (False, True, False, True):
                fill(weights, random_state_dict(path))
                fill(of_draft, weights if is_alike else random_state_dict(draft))
                report = publisher.publish()
                assert report.digests_match
                assert not report.unused
                assert_live(worker_of(llm).get_model(), weights)
                assert_live(worker_of(llm).get_draft_model(), of_draft)
                got, share = accepted(llm)
                assert share > 0.9 if is_alike else share < 0.2
                host = {name: value.cpu() for name, value in weights.items()}
                seen.append((save_checkpoint(tmp_path / f"push-{len(seen)}", host, like=path), got, share))
    folder, got, share = seen[-1]
    how["model"] = str(folder)
    with engine(folder, speculative_config=how, disable_log_stats=False) as llm:
        assert accepted(llm) == (got, share), "as after a fresh load of the same two checkpoints"


@pytest.mark.parametrize("runner", ["v1", "v2"], indirect=True)
def test_an_eagle_head_shares_embeddings_and_head(tmp_path: Path, runner: str) -> None:
    path = tiny_model(tmp_path / "m", "llama")
    like = build_tiny_model(tmp_path / "d", "llama", "bfloat16", **{**DIMENSIONS, "num_hidden_layers": 1})
    head = save_checkpoint(tmp_path / "head", fresh_head(like), like=like)
    weights, of_draft = on_gpu(random_state_dict(path)), on_gpu(fresh_head(like))

    def how(head: Path) -> dict[str, Any]:
        return {"method": "eagle", "model": str(head), "num_speculative_tokens": NUM_DRAFTED}

    seen = []
    with engine(path, speculative_config=how(head), disable_log_stats=False) as llm:
        check_runner(llm, runner)
        target, draft = worker_of(llm).get_model(), worker_of(llm).get_draft_model()
        with Publisher(weights, [llm], timeout_s=60) as publisher, pytest.raises(PlanMismatch, match="draft"):
            publisher.connect()
        with Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60) as publisher:
            for number in range(2):
                fill(weights, random_state_dict(path))
                fill(of_draft, fresh_head(like))
                assert publisher.publish().digests_match
                assert_live(target, weights)
                assert_live(draft, of_draft)
                assert draft.model.embed_tokens is target.model.embed_tokens
                host, host_head = ({n: v.cpu() for n, v in given.items()} for given in (weights, of_draft))
                folder = save_checkpoint(tmp_path / f"push-{number}", host, like=path)
                seen.append((folder, save_checkpoint(tmp_path / f"head-{number}", host_head, like=like), accepted(llm)))
        with Publisher(weights, [llm], timeout_s=60, keep=["draft"]) as publisher:
            fill(weights, random_state_dict(path))
            publisher.publish()
            assert_live(target, weights)
            assert_live(draft, of_draft)
    for folder, head, got in seen:
        with engine(folder, speculative_config=how(head), disable_log_stats=False) as llm:
            assert accepted(llm) == got
