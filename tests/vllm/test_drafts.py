"""Models to speculate with: brought to the same version as their target by the same commit, and never left behind silently."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.vllm import offline
from tests.vllm.test_models import build, model_of, worker_of
from tests.vllm.weights import fill

from weightcast import Publisher
from weightcast.content.layout_digest import digest_tensor
from weightcast.content.live_tensors import LiveTensor, TensorDigest, tensor_digests
from weightcast.deadline import Deadline
from weightcast.engines.stock.reach import reachable
from weightcast.engines.vllm import twin
from weightcast.engines.vllm.api import HELPERS
from weightcast.errors import EngineError, PlanMismatch, RoundFailed, WeightcastError
from weightcast.manifest import Manifest, TensorSpec
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


def compared(llm: Any, weights: Weights) -> Mapping[str, TensorDigest]:
    """What the engine tells ``weightcast verify`` of these tensors."""
    specs = [TensorSpec(name=name, dtype="bfloat16", shape=tuple(value.shape)) for name, value in weights.items()]
    asked = {"tensors": msgspec.to_builtins(specs)}
    outcomes = llm.collective_rpc("weightcast_call", args=("digests", asked))
    workers = [msgspec.convert(outcome["tensors"], dict[str, LiveTensor]) for outcome in outcomes]
    return tensor_digests(Manifest.of(specs), workers)


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
        assert compared(llm, weights)["draft."].reason
        fill(of_draft, weights)
        with Publisher({"": weights, "draft.": of_draft}, [llm], timeout_s=60) as publisher:
            publisher.publish()
            assert_live(worker_of(llm).get_draft_model(), of_draft)
            both = {**weights, **{f"draft.{name}": value for name, value in of_draft.items()}}
            found = {name: told.digest for name, told in compared(llm, both).items()}
            assert found == {name: f"{digest_tensor(value):016x}" for name, value in both.items()}
            assert compared(llm, weights)["draft."].reason
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


def eagle_head(folder: Path) -> Path:
    """An EAGLE head without embeddings and output head of its own."""
    path = build(folder, "llama", num_hidden_layers=1)
    return save_checkpoint(folder.parent / "head", fresh_head(path), like=path)


def fresh_head(path: Path) -> Weights:
    given = {name.removeprefix("model."): value for name, value in random_state_dict(path).items()}
    layer = {name: value for name, value in given.items() if "layers.0." in name and "input_layernorm" not in name}
    return {**layer, "fc.weight": torch.randn(64, 128).mul(0.1).bfloat16()}


def mtp_model(folder: Path, num_layers: int = 2) -> Path:
    """A DeepSeek-V3 whose checkpoint has an MTP block behind its layers."""
    path = build(folder, "deepseek_v3", num_hidden_layers=num_layers)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return save_checkpoint(folder.parent / "with-mtp", with_block(path), like=path)


def with_block(path: Path) -> Weights:
    """Fresh values of the model and its block, which has copies of embedding and head as published checkpoints do."""
    model, other = random_state_dict(path), random_state_dict(path)
    at = f"model.layers.{json.loads((path / 'config.json').read_text())['num_hidden_layers']}."
    block = {name.replace("model.layers.1.", at): v for name, v in other.items() if name.startswith("model.layers.1.")}
    norms = {name: torch.rand(64).add(0.5).bfloat16() for name in ("enorm", "hnorm", "shared_head.norm")}
    return {
        **model,
        **block,
        **{f"{at}{name}.weight": value for name, value in norms.items()},
        f"{at}eh_proj.weight": torch.randn(64, 128).mul(0.1).bfloat16(),
        f"{at}embed_tokens.weight": model["model.embed_tokens.weight"].clone(),
        f"{at}shared_head.head.weight": model["lm_head.weight"].clone(),
    }


def contents(llm: Any) -> dict[str, torch.Tensor]:
    """All that the two models can read, and what is packed in kernels."""
    found = {}
    for model in (model_of(llm), worker_of(llm).get_draft_model()):
        key = type(model).__name__
        found |= {
            f"{key}.{place}": tensor.clone() for place, tensor in reachable(model, HELPERS).items() if tensor.numel()
        }
        packed = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "cpu_linear")]
        found |= {
            f"{key}.{name}()": weight_of(layer) for name, layer in packed if hasattr(layer, "input_size_per_partition")
        }
    return {place: tensor for place, tensor in found.items() if not re.search(r"kv_cache|buffer|workspace", place)}


@pytest.mark.parametrize(("method", "mode"), [("eagle", "in_place"), ("mtp", "staged")])
def test_heads_and_blocks_equal_a_fresh_load(tmp_path: Path, method: str, mode: str) -> None:
    path = build(tmp_path / "m", "llama") if method == "eagle" else mtp_model(tmp_path / "m")
    head = eagle_head(tmp_path / "d") if method == "eagle" else path
    fresh = (lambda: random_state_dict(path)) if method == "eagle" else (lambda: with_block(path))
    weights, of_draft = fresh(), fresh_head(head)
    source: Any = {"": weights, "draft.": of_draft} if method == "eagle" else weights
    how: dict[str, Any] = {"method": method, "num_speculative_tokens": 1}
    seen = []

    def speculating(path: Path, head: Path) -> Any:
        model = {"model": str(head)} if method == "eagle" else {}
        return offline.engine(path, speculative_config={**how, **model}, disable_log_stats=False)

    with speculating(path, head) as llm, Publisher(source, [llm], timeout_s=60, mode=mode) as publisher:
        for number in range(2):
            fill(weights, fresh())
            fill(of_draft, fresh_head(head))
            report = publisher.publish()
            assert report.digests_match
            assert not report.unused
            assert model_of(llm).model.embed_tokens is worker_of(llm).get_draft_model().model.embed_tokens
            folders = (
                save_checkpoint(tmp_path / f"push-{number}", weights, like=path),
                save_checkpoint(tmp_path / f"head-{number}", of_draft, like=head),
            )
            seen.append((folders, accepted(llm), contents(llm)))
    assert seen[0][1] != seen[1][1]
    for (folder, of_head), got, live in seen:
        with speculating(folder, of_head) as llm:
            loaded = contents(llm)
            assert loaded.keys() == live.keys()
            assert [place for place, tensor in loaded.items() if not torch.equal(tensor, live[place])] == []
            assert accepted(llm) == got


def test_a_blocks_copy_of_the_embedding_is_the_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has the block share the target's; of a large model a twin with few layers is tried, and the whole block."""
    made = []
    original = twin.api.build_draft_twin

    def counted(*arguments: Any) -> Any:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(twin.api, "build_draft_twin", counted)
    monkeypatch.setattr(twin, "WHOLE_NBYTES", 0)
    path = mtp_model(tmp_path / "m", num_layers=3)
    weights = with_block(path)
    names = ("model.embed_tokens.weight", "model.layers.3.embed_tokens.weight")
    with (
        offline.engine(path, speculative_config={"method": "mtp", "num_speculative_tokens": 1}) as llm,
        Publisher(weights, [llm], timeout_s=60) as publisher,
    ):
        publisher.publish()
        assert made
        assert all(list(model.model.layers) == ["3"] for model in made)
        before = tokens(llm)
        weights[names[1]].mul_(2)
        with pytest.raises(WeightcastError) as caught:
            publisher.publish()
        told = str(next(iter(getattr(caught.value, "causes", {}).values()), caught.value))
        assert all(name in told for name in names)
        assert tokens(llm) == before
