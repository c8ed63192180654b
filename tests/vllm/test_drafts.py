"""Models to speculate with: brought to the same version as their target by the same commit, and never left behind silently."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.test_models import build, model_of, worker_of
from tests.vllm.weights import fill

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, PlanMismatch, RoundFailed
from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.trainer.clients import CommitOrder, CommitReply, make_clients

NUM_DRAFTED = 3
Weights = dict[str, torch.Tensor]


def drafted(path: Path, draft: Path, **options: Any) -> Any:
    """An engine of the model ``path`` that speculates with the model ``draft``, and counts what is accepted."""
    how = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTED}
    return offline.engine(path, speculative_config=how, disable_log_stats=False, **options)


def tokens(llm: Any) -> list[list[int]]:
    return [ids for ids, _ in offline.answers(llm)]


def accepted(llm: Any) -> tuple[list[list[int]], float]:
    """Greedy tokens, and the share of drafted tokens that were accepted while they were made."""
    before, got, after = _counts(llm), tokens(llm), _counts(llm)
    return got, (after[1] - before[1]) / (after[0] - before[0])


def _counts(llm: Any) -> tuple[float, float]:
    found = {metric.name: metric.value for metric in llm.get_metrics() if metric.name.startswith("vllm:spec_decode")
             and hasattr(metric, "value")}  # fmt: skip
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]


def weight_of(layer: Any) -> torch.Tensor:
    """A layer's weight as the layer computes with it: what it makes of one-hot inputs. Kernels on a CPU keep it packed."""
    size = layer.input_size_per_partition
    eye = torch.eye(size, dtype=torch.bfloat16)
    return torch.cat([layer.quant_method.apply(layer, part, None) for part in eye.split(64)]).t()


def assert_live(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    """A Qwen3 computes with exactly these values."""
    size = len(values["lm_head.weight"])
    assert torch.equal(model.model.norm.weight, values["model.norm.weight"])
    assert torch.equal(model.model.embed_tokens.weight[:size], values["model.embed_tokens.weight"])
    for number, layer in enumerate(model.model.layers):
        of = {name.removeprefix(f"model.layers.{number}."): value for name, value in values.items()}
        fused = torch.cat([of[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(weight_of(layer.self_attn.qkv_proj), fused)
        assert torch.equal(weight_of(layer.self_attn.o_proj), of["self_attn.o_proj.weight"])
        fused = torch.cat([of[f"mlp.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(weight_of(layer.mlp.gate_up_proj), fused)
        assert torch.equal(weight_of(layer.mlp.down_proj), of["mlp.down_proj.weight"])
        assert torch.equal(layer.input_layernorm.weight, of["input_layernorm.weight"])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return build(tmp_path / "m", "qwen3"), build(tmp_path / "d", "qwen3")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_draft_is_of_its_targets_version(folders: tuple[Path, Path], mode: str) -> None:
    path, draft = folders
    weights, of_draft = random_state_dict(path), random_state_dict(draft)
    seen = []
    with (
        drafted(path, draft) as llm,
        Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60, mode=mode) as publisher,
    ):
        for is_alike in (False, True, False, True):
            fill(weights, random_state_dict(path))
            fill(of_draft, weights if is_alike else random_state_dict(draft))
            report = publisher.publish()
            assert report.digests_match
            assert not report.unused
            assert llm.get_weight_version() == report.version
            assert_live(model_of(llm), weights)
            assert_live(worker_of(llm).get_draft_model(), of_draft)
            got, share = accepted(llm)
            assert share > 0.95 if is_alike else share < 0.1
            seen.append((save_checkpoint(path.parent / f"push-{len(seen)}", weights, like=path), got))
    for folder, got in seen:
        with offline.engine(folder) as llm:
            assert tokens(llm) == got, "whatever is drafted, the tokens are the target's"


def test_a_round_that_is_taken_back_takes_back_both(folders: tuple[Path, Path]) -> None:
    path, draft = folders
    weights, of_draft = random_state_dict(path), random_state_dict(draft)

    def lost(client: Any) -> Callable[[CommitOrder, Deadline], CommitReply]:
        commit = client.commit

        def committed(order: CommitOrder, deadline: Deadline) -> CommitReply:
            commit(order, deadline)
            raise EngineError("its answer was lost", engine=client.name)

        return committed

    with drafted(path, draft) as llm:
        client = make_clients([llm])[0]
        with Publisher({"": weights, "draft.": of_draft}, [client], timeout_s=60, mode="staged") as publisher:
            publisher.publish()
            kept = {name: value.clone() for name, value in weights.items()}
            kept_draft = {name: value.clone() for name, value in of_draft.items()}
            before = (tokens(llm), llm.get_weight_version())
            fill(weights, random_state_dict(path))
            fill(of_draft, random_state_dict(draft))
            working, client.commit = client.commit, lost(client)  # type: ignore[method-assign]
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
            assert caught.value.dirty == ()
            assert (tokens(llm), llm.get_weight_version()) == before
            assert_live(model_of(llm), kept)
            assert_live(worker_of(llm).get_draft_model(), kept_draft)
            client.commit = working  # type: ignore[method-assign]
            publisher.publish()
            assert_live(model_of(llm), weights)
            assert_live(worker_of(llm).get_draft_model(), of_draft)


def test_a_draft_keeps_its_weights_where_that_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path, draft = folders
    weights, of_draft = random_state_dict(path), random_state_dict(draft)
    with drafted(path, draft) as llm:
        before = tokens(llm)
        with Publisher(weights, [llm], timeout_s=60) as publisher, pytest.raises(PlanMismatch) as caught:
            publisher.connect()
        assert "draft" in caught.value.message
        assert 'keep=["draft"]' in caught.value.hint
        assert tokens(llm) == before
        with Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60) as publisher:
            publisher.publish()
        with Publisher(weights, [llm], timeout_s=60, keep=["draft"]) as publisher:
            for _ in range(2):
                fill(weights, random_state_dict(path))
                publisher.publish()
                assert_live(model_of(llm), weights)
                assert_live(worker_of(llm).get_draft_model(), of_draft)
        fill(of_draft, weights)
        with Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60) as publisher:
            publisher.publish()
            assert_live(worker_of(llm).get_draft_model(), of_draft)
            got, share = accepted(llm)
            assert share > 0.95
    with offline.engine(save_checkpoint(tmp_path / "fresh", weights, like=path)) as llm:
        assert tokens(llm) == got


def test_a_draft_that_an_engine_has_not(folders: tuple[Path, Path]) -> None:
    path, draft = folders
    source = {"": random_state_dict(path), "draft.": random_state_dict(draft)}
    with offline.engine(path) as llm:
        with Publisher(source, [llm], timeout_s=60) as publisher, pytest.raises(PlanMismatch, match="draft"):
            publisher.connect()
        with Publisher(source, [llm], timeout_s=60, unused=["draft.*"]) as publisher:
            assert publisher.publish().unused
            assert_live(model_of(llm), source[""])
