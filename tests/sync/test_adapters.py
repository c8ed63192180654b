"""Modules with adapters of PEFT: merged weights are published as merge_and_unload() makes them of a copy, and the module stays as it is."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from tiny_adapters import LINEAR, assert_same, base, learn, lora, merged, published, scatter
from tiny_modules import new_model, saved
from torch import nn

from weightcast import Publisher
from weightcast.errors import StateError, Unsupported, WeightsMoved
from weightcast.sources import MergedSource, make_source
from weightcast.testing.local_engine import DictModel, LocalEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


class Untouched:
    """Everything of a model that a round might change: objects, places, bytes, flags, attributes of adapters, random numbers."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._then = model, self._seen(model)

    @staticmethod
    def _seen(model: nn.Module) -> list[Any]:
        values = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return [
            [(n, id(v), v.data_ptr(), v._version, v.requires_grad, v.grad is None, v.tolist()) for n, v in values],
            [(name, id(part), type(part), part.training) for name, part in model.named_modules()],
            [
                (name, key, repr(value))
                for name, part in model.named_modules()
                for key, value in vars(part).items()
                if key not in ("_parameters", "_buffers", "_modules") and isinstance(value, (dict, list, set, bool))
            ],
            torch.get_rng_state().tolist(),
            random.getstate(),
        ]

    def check(self) -> None:
        assert self._seen(self._model) == self._then


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(target_modules=["c_attn", "c_proj"], lora_bias=True, fan_in_fan_out=True),
    "conv1d": lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "dora conv1d": lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "dora embeddings": lambda: lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "modules to save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "tokens": lambda: lora(trainable_token_indices=[1, 5, 7]),
    "ranks": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "adalora": lambda: AdaLoraConfig(target_modules=LINEAR, total_step=10),
    "loha": lambda: LoHaConfig(target_modules=LINEAR),
    "lokr": lambda: LoKrConfig(target_modules=LINEAR),
    "ia3": lambda: IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(target_modules=LINEAR, oft_block_size=4),
    "vera": lambda: VeraConfig(target_modules=["q_proj", "down_proj"][:1], r=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_what_peft_merges(kind: str, dtype: torch.dtype) -> None:
    arch = "gpt2" if kind in ("bias", "conv1d", "dora conv1d") else "qwen3"
    model = get_peft_model(base(arch, dtype), KINDS[kind]())
    source = make_source(model)
    assert isinstance(source, MergedSource)
    assert source.own_nbytes > 0
    for _ in range(2):
        scatter(model)
        truth, untouched = merged(model), Untouched(model)
        source.refresh()
        untouched.check()
        assert_same(published(source), truth)


def test_a_tied_embedding_with_an_adapter_is_merged_for_both_names() -> None:
    model = get_peft_model(base("qwen3_tied"), lora(target_modules=["embed_tokens", "q_proj"]))
    source = make_source(model)
    scatter(model)
    source.refresh()
    truth = merged(model)
    assert torch.equal(truth["lm_head.weight"], truth["model.embed_tokens.weight"])
    assert_same(published(source), truth)


@pytest.mark.parametrize("arch", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_adapters_of_fused_experts_are_published_as_the_checkpoint(arch: str, tmp_path: Path) -> None:
    """``target_parameters``: PEFT nests its layers around the experts, and transformers cuts them on the way to a checkpoint."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(new_model(arch), lora(target_modules=["q_proj"], target_parameters=parameters))
    source = make_source(model)
    for _ in range(2):
        scatter(model)
        untouched = Untouched(model)
        source.refresh()
        untouched.check()
        whole = copy.deepcopy(model).merge_and_unload()
        found: dict[str, torch.Tensor] = {}
        for p in source.layout.placements:
            spec = source.manifest[p.region.name]
            target = found.setdefault(p.region.name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))
            at = tuple(slice(o, o + s) for o, s in zip(p.region.offsets, p.region.sizes, strict=True))
            target[at] = source.memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides)
        assert_same(found, saved(whole, tmp_path))


def served(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.models[0].parameters().items()}


@pytest.mark.parametrize(
    ("transport", "mode"), [("shm", "in_place"), ("shm", "staged"), ("tcp", "staged"), ("tcp", "in_place")]
)
def test_a_learning_adapter_is_published_round_by_round(transport: str, mode: str) -> None:
    model = get_peft_model(base(), lora(use_dora=True, modules_to_save=["lm_head"], init_lora_weights=False))
    optimizer = torch.optim.AdamW((v for v in model.parameters() if v.requires_grad), lr=0.05)
    engine = LocalEngine("e", [DictModel(merged(model), relocatable=mode == "staged")])
    try:
        with Publisher(model, [engine], transport=transport, mode=mode, timeout_s=30) as publisher:  # type: ignore[arg-type]
            versions = set()
            for _ in range(3):
                learn(model, optimizer)
                truth = merged(model)
                publisher.connect()  # on a CPU the first time moves parameters to memory that is shared
                untouched = Untouched(model)
                report = publisher.publish()
                untouched.check()
                assert report.digests_match
                assert report.own_nbytes > 0
                assert_same(served(engine), truth)
                versions.add(report.version.partition("-")[2])
            assert len(versions) == 3
        learn(model, optimizer)
    finally:
        engine.stop()


def changes() -> dict[str, Callable[[Any], None]]:
    """What a user may do to adapters between rounds without another form of the merged model."""

    def more(model: Any) -> None:
        model.add_adapter("other", lora(r=2, use_rslora=True, init_lora_weights=False))

    def both(model: Any) -> None:
        more(model)
        model.base_model.set_adapter(["default", "other"])

    def switch(model: Any) -> None:
        more(model)
        model.set_adapter("other")

    def weighted(model: Any) -> None:
        more(model)
        model.add_weighted_adapter(["default", "other"], [0.7, 0.6], "mix", combination_type="cat")
        model.set_adapter("mix")

    def scale(model: Any) -> None:
        for part in model.modules():
            if hasattr(part, "set_scale"):
                part.set_scale("default", 3.0)

    return {
        "more": more,
        "both": both,
        "switch": switch,
        "weighted": weighted,
        "scale": scale,
        "merged": lambda model: model.merge_adapter(),
        "deleted": lambda model: (more(model), model.set_adapter("other"), model.delete_adapter("default")),
    }


@pytest.mark.parametrize("change", changes())
def test_adapters_that_change_between_rounds_are_taken_up(change: str) -> None:
    model = get_peft_model(base(), lora())
    scatter(model)
    engine = LocalEngine("e", [DictModel(merged(model))])
    try:
        with Publisher(model, [engine], timeout_s=30) as publisher:
            publisher.publish()
            before = served(engine)
            changes()[change](model)
            truth = merged(model)
            publisher.publish()
            assert_same(served(engine), truth)
            assert (change in ("more", "merged")) == all(torch.equal(before[n], v) for n, v in truth.items())
            scatter(model)
            publisher.publish()
            assert_same(served(engine), merged(model))
    finally:
        engine.stop()


def test_what_a_module_computes_with_is_published_when_adapters_are_disabled() -> None:
    model = get_peft_model(base(), lora())
    scatter(model)
    plain = {
        name.replace(".base_layer", ""): value.clone()
        for name, value in model.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    source = make_source(model)
    with model.disable_adapter():
        source.refresh()
    assert_same(published(source), plain)
    source.refresh()
    assert_same(published(source), merged(model))


def other_forms() -> dict[str, Callable[[Any], None]]:
    """What leaves the merged model with other modules than connect() saw."""

    def more_layers(model: Any) -> None:
        model.add_adapter("other", lora(target_modules=["o_proj"]))

    def other_saved(model: Any) -> None:
        model.add_adapter("other", lora(modules_to_save=["lm_head"]))
        model.set_adapter("other")

    def unloaded(model: Any) -> None:
        model.unload()

    def replaced(model: Any) -> None:
        model.get_base_model().model.layers[1] = copy.deepcopy(model.get_base_model().model.layers[0])

    def weight(model: Any) -> None:
        layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))

    return {"layers": more_layers, "saved": other_saved, "unloaded": unloaded, "replaced": replaced, "weight": weight}


@pytest.mark.parametrize("change", other_forms())
def test_another_form_is_named_and_connect_takes_it_up(change: str) -> None:
    model = get_peft_model(base(), lora(modules_to_save=["lm_head"]))
    engine = LocalEngine("e", [DictModel(merged(model))])
    try:
        with Publisher(model, [engine], timeout_s=30) as publisher:
            publisher.publish()
            other_forms()[change](model)
            scatter(model)
            before = served(engine)
            with pytest.raises(StateError, match=r"model\.layers|lm_head") as caught:
                publisher.publish()
            assert "connect()" in str(caught.value)
            assert_same(served(engine), before)
            publisher.connect()
            publisher.publish()
            truth = model.get_base_model().state_dict() if change == "unloaded" else merged(model)
            assert_same(served(engine), truth)
    finally:
        engine.stop()


def test_adapters_come_to_a_module_that_had_none_and_go_again() -> None:
    model = base()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(model, [engine], timeout_s=30) as publisher:
            publisher.publish()
            inject_adapter_in_model(lora(init_lora_weights=False), model)
            with pytest.raises(StateError, match="self_attn"):
                publisher.publish()
            publisher.connect()
            publisher.publish()
            alike = copy.deepcopy(model)
            for part in alike.modules():
                for name, child in part.named_children():
                    if hasattr(child, "base_layer"):
                        child.merge()
                        setattr(part, name, child.base_layer)
            assert_same(served(engine), alike.state_dict())
    finally:
        engine.stop()


def test_adapters_of_several_kinds_in_one_model_are_all_merged() -> None:
    model = get_peft_model(base(), lora(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["q_proj", "down_proj"]))
    model.set_adapter(["default", "other"])
    source = make_source(model)
    scatter(model)
    source.refresh()
    assert_same(published(source), merged(model))


def test_what_has_no_merged_form_is_refused_by_name() -> None:
    prompts = get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(Unsupported, match="PROMPT_TUNING") as caught:
        make_source(prompts)
    assert "get_base_model()" in str(caught.value)
    assert_same(published(make_source(prompts.get_base_model())), prompts.get_base_model().state_dict())


def test_the_state_dict_of_an_adapted_module_is_refused_with_a_way_that_works() -> None:
    model = get_peft_model(base(), lora())
    with pytest.raises(Unsupported, match=r"layers\.0\.self_attn\.q_proj\.") as caught:
        make_source(model.state_dict())
    assert "Give the PEFT model itself" in str(caught.value)
    make_source(model)


def test_tensors_that_lie_elsewhere_are_taken_up_without_another_source() -> None:
    model = get_peft_model(base(), lora(modules_to_save=["lm_head"]))
    source = make_source(model)
    scatter(model)
    for value in model.parameters():
        value.data = value.data.clone()
    with pytest.raises(WeightsMoved):
        source.refresh()
    assert source.follow()
    source.refresh()
    assert_same(published(source), merged(model))


def test_a_closed_source_has_no_memory_of_its_own() -> None:
    model = get_peft_model(base(), lora())
    source = make_source(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    place = next(p for p in source.layout.placements if p.region.name == name)
    merged_weight = weakref.ref(source.memory.storages[place.storage].untyped_storage())
    source.refresh()
    assert merged_weight() is not None
    source.close()
    assert merged_weight() is None
    assert not source.follow()


def test_nothing_of_a_source_is_left_in_the_module() -> None:
    model = get_peft_model(base(), lora())
    engine = LocalEngine("e", [DictModel(merged(model))])
    try:
        scatter(model)
        truth = {name: value.clone() for name, value in model.state_dict().items()}
        with Publisher(model, [engine], transport="shm", timeout_s=30) as publisher:
            publisher.publish()
        assert_same(model.state_dict(), truth)
        assert not any(value.is_shared() for value in model.parameters())
        assert_same(copy.deepcopy(model).state_dict(), truth)
    finally:
        engine.stop()
