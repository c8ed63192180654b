"""EmbeddedModel: whatever way weights come in, live bytes are those of a fresh load."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from weightcast.engines.embedded.live_model import EmbeddedModel
from weightcast.errors import InvalidInput, LoadError, PlanMismatch
from weightcast.layout import image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import name_of
from weightcast.plan import compile_plan
from weightcast.plan.replay import Replay
from weightcast.testing.models import ARCHS, build_tiny_model, random_state_dict, save_checkpoint

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def _manifest(weights):
    return Manifest.of(
        TensorSpec(name=name, dtype=name_of(t.dtype), shape=tuple(t.shape)) for name, t in weights.items()
    )


def _image(manifest, weights):
    memory = Memory([torch.zeros(manifest.image_nbytes, dtype=torch.uint8)], is_arena=True)
    for place in image_layout(manifest).placements:
        view = memory.view(0, place.dtype, place.offset, place.region.sizes, place.strides)
        view.copy_(weights[place.region.name])
    return memory


def _load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def _assert_equal(model, fresh):
    have, want = model.state_dict(), fresh.state_dict()
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert torch.equal(have[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def _apply(live, weights, order=None):
    """Record and replay; returns the number of copies."""
    manifest = _manifest({name: weights[name] for name in order or weights})
    before = live.checksums()
    layout = live.layout(manifest)
    assert live.checksums() == before
    assert layout.through_loader == ()
    layout.check(manifest)
    plan = compile_plan(manifest, {0: image_layout(manifest)}, layout)
    replay = Replay(plan[0], _image(manifest, weights), live.memory())
    replay.run()
    return len(replay)


@pytest.fixture
def moe(tmp_path):
    folder = build_tiny_model(tmp_path / "a", "qwen3_moe")
    return EmbeddedModel(_load(folder)), random_state_dict(folder)


@pytest.mark.parametrize("arch", ARCHS)
def test_loaded_and_replayed_bytes_equal_a_fresh_load(arch, tmp_path):
    first = build_tiny_model(tmp_path / "a", arch)
    weights = random_state_dict(first)
    fresh = _load(save_checkpoint(tmp_path / "b", weights, like=first))
    loaded, replayed = EmbeddedModel(_load(first)), EmbeddedModel(_load(first))
    _assert_equal(loaded.model, _load(first))
    loaded.load_weights(iter(weights.items()))
    _assert_equal(loaded.model, fresh)
    _apply(replayed, weights)
    _assert_equal(replayed.model, fresh)
    assert loaded.checksums() == replayed.checksums()
    tokens = torch.tensor([[3, 77, 12, 250]])
    assert torch.equal(replayed.model(tokens).logits, fresh(tokens).logits)


@pytest.mark.parametrize("arch", ["qwen3_tied", "llama", "deepseek_v3"])
def test_values_are_cast_to_the_dtype_of_the_parameters(arch, tmp_path):
    first = build_tiny_model(tmp_path / "a", arch)
    weights = random_state_dict(first)
    fresh = _load(save_checkpoint(tmp_path / "b", weights, like=first), dtype=torch.bfloat16)
    loaded, replayed = (EmbeddedModel(_load(first, dtype=torch.bfloat16)) for _ in range(2))
    loaded.load_weights(iter(weights.items()))
    _apply(replayed, weights)
    for live in (loaded, replayed):
        _assert_equal(live.model, fresh)


def test_the_arena_follows_the_manifest_so_that_a_dense_model_is_one_memcpy(tmp_path):
    first = build_tiny_model(tmp_path / "a", "llama")
    weights = random_state_dict(first)
    live = EmbeddedModel(_load(first))
    order = sorted(weights, key=lambda name: name[::-1])
    assert _apply(live, weights, order) == 1
    _assert_equal(live.model, _load(save_checkpoint(tmp_path / "b", weights, like=first)))
    assert live.model.get_parameter(order[0]).storage_offset() == 0


def test_parameters_share_one_storage_and_tied_ones_their_bytes(tmp_path):
    model = _load(build_tiny_model(tmp_path, "qwen3_tied"))
    parameters = dict(model.named_parameters())
    live = EmbeddedModel(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == {live.memory().storages[0].data_ptr()}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in live.checksums()


def test_rebind_moves_without_copying(moe):
    live, _ = moe
    tokens = torch.tensor([[9, 8, 7]])
    logits, checksums = live.model(tokens).logits, live.checksums()
    old = live.memory()
    copy = Memory([old.storages[0].clone()])
    live.rebind(copy)
    old.storages[0].random_()
    assert live.memory() is copy
    assert torch.equal(live.model(tokens).logits, logits)
    assert live.checksums() == checksums
    copy.storages[0].copy_(old.storages[0])
    assert live.checksums() != checksums
    with pytest.raises(InvalidInput, match="the arena is"):
        live.rebind(Memory([copy.storages[0][:-256]]))


def test_a_part_of_whole_parameters_can_be_loaded(moe):
    live, weights = moe
    before = live.checksums()
    live.load_weights(iter([("model.norm.weight", weights["model.norm.weight"])]))
    assert [name for name, digest in live.checksums().items() if digest != before[name]] == ["model.norm.weight"]


def _without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {**w, "model.layers.9.nothing.weight": torch.randn(2)},
            "no place for model.layers.9.nothing.weight",
        ),
        (lambda w: {**w, "model.norm.weight": torch.randn(65)}, r"model.norm.weight has shape \(65,\)"),
        (lambda w: _without(w, EXPERT), f"are missing: {EXPERT}"),
        (lambda w: {name: w[name] for name in w if "experts.3.up" not in name}, "experts.3.up_proj.weight"),
        (lambda w: {name.replace("experts.2.", "experts.5."): w[name] for name in w}, "numbers have gaps"),
        (lambda w: {**w, EXPERT: torch.randn(48, 65)}, "pieces do not fit"),
    ],
)
def test_bad_weights_are_refused_before_anything_is_written(moe, change, message):
    live, weights = moe
    before = live.checksums()
    with pytest.raises(LoadError, match=message):
        live.load_weights(iter(change(weights).items()))
    assert live.checksums() == before


def test_a_name_given_twice_is_refused(moe):
    live, weights = moe
    with pytest.raises(LoadError, match="given twice"):
        live.load_weights(iter([*weights.items(), ("lm_head.weight", weights["lm_head.weight"])]))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "lm_head.weight", EXPERT])
def test_a_missing_tensor_is_named(moe, name):
    live, weights = moe
    with pytest.raises(PlanMismatch, match=name):
        live.layout(_manifest(_without(weights, name)))


def test_missing_experts_of_a_whole_layer_are_named(moe):
    live, weights = moe
    with pytest.raises(PlanMismatch, match=r"needs 8 tensors .* model.layers.0.mlp.experts.0.gate_proj.weight"):
        live.layout(_manifest({n: t for n, t in weights.items() if "layers.0.mlp.experts" not in n or "down" in n}))


def test_a_wrong_shape_in_the_manifest_is_a_mismatch(moe):
    live, weights = moe
    with pytest.raises(PlanMismatch, match=r"model\.norm\.weight"):
        live.layout(_manifest({**weights, "model.norm.weight": torch.randn(3)}))


def test_a_model_of_another_size_is_named_by_its_first_tensors(moe):
    live, weights = moe
    with pytest.raises(PlanMismatch) as caught:
        live.layout(_manifest({name: torch.randn(3, 3) for name in weights}))
    assert len(caught.value.message) < 600
    assert caught.value.message.count(" has shape (3, 3), the model needs ") <= 4
    assert re.search(r" and \d+ more$", caught.value.message)


def test_tensors_without_a_use_are_absent_from_the_layout(moe):
    live, weights = moe
    layout = live.layout(_manifest({**weights, "value_head.weight": torch.randn(5)}))
    assert "value_head.weight" not in {p.region.name for p in layout.placements} | set(layout.through_loader)


def test_a_tied_model_takes_embeddings_alone_or_both_names(tmp_path, caplog):
    folder = build_tiny_model(tmp_path, "qwen3_tied")
    weights = random_state_dict(folder)
    live = EmbeddedModel(_load(folder))
    _apply(live, weights)
    _apply(live, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert not caplog.records
    assert torch.equal(live.model.lm_head.weight, weights["model.embed_tokens.weight"])
    with pytest.raises(PlanMismatch, match=r"model\.embed_tokens\.weight"):
        live.layout(_manifest(_without(weights, "model.embed_tokens.weight")))
