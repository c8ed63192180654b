"""What a model derives from its weights and keeps beside them: renewed with each version, or the model is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.test_models import build, model_of, pushed_and_fresh, worker_of
from tests.vllm.weights import fill
from torch import nn

from weightcast import Publisher
from weightcast.engines.stock.reach import Alias, aliases, reachable
from weightcast.engines.vllm import twin
from weightcast.engines.vllm.api import HELPERS
from weightcast.errors import ShadowError, Unsupported, WeightcastError
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint


class Mixer(nn.Module):
    """Keeps views of a weight, and a copy, in all the ways that models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 6, bias=False)
        self.register_buffer("lower", self.conv.weight.detach().view(24)[12:], persistent=False)
        self.turned = self.conv.weight.detach().t()
        self.rows = [self.conv.weight.detach()[1], torch.zeros(3)]
        self.named = {"row": self.conv.weight.detach()[2]}
        self.copied = self.conv.weight.detach().clone()
        self.same = [self.conv.weight]


def test_views_of_weights_are_found_wherever_they_are_kept() -> None:
    model = nn.ModuleDict({"mixer": Mixer()})
    found = {alias.place: alias for alias in aliases(model, HELPERS)}
    assert set(found) == {"mixer.lower", "mixer.turned", "mixer.rows[0]", "mixer.named[row]"}
    other = torch.rand(6, 4)
    tensors = reachable(model, HELPERS)
    with torch.no_grad():
        model.get_parameter("mixer.conv.weight").copy_(other)
    for alias in found.values():
        assert (alias.layer, alias.own) == ("mixer.conv", "weight")
        assert torch.equal(alias.of(other), tensors[alias.place])
        assert torch.equal(alias.of(torch.cat([torch.zeros(2, 4), other])[2:]), tensors[alias.place])
    assert "mixer.copied" in tensors


@pytest.mark.parametrize(
    ("arch", "mode"),
    [("nemotron_h", "staged"), ("mamba2", "in_place"), ("falcon_h1", "staged"), ("granitemoehybrid", "in_place")],
)
def test_state_space_models_equal_a_fresh_load(tmp_path: Path, arch: str, mode: str) -> None:
    path = build_tiny_model(tmp_path / "m", arch, dtype="bfloat16")
    kept = []

    def look(llm: Any) -> None:
        kept.append(
            next(t.clone() for place, t in reachable(model_of(llm), HELPERS).items() if place.endswith("conv_weights"))
        )

    pushed_and_fresh(path, mode=mode, check=look)
    assert not torch.equal(kept[0], kept[1]), "what the mixer computes with is what was pushed"


def test_a_round_that_fails_leaves_what_was_derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader stumbles after it took everything: what lies beside the weights is that of version n like the weights."""
    path = build_tiny_model(tmp_path / "m", "falcon_h1", dtype="bfloat16")
    weights = random_state_dict(path)
    with offline.engine(path) as llm, Publisher(weights, [llm], timeout_s=60, mode="staged") as publisher:
        publisher.publish()
        before = offline.answers(llm)
        model = model_of(llm)
        load = model.load_weights

        def stumbling(tensors: Any) -> Any:
            load(tensors)
            monkeypatch.setattr(model, "load_weights", load, raising=False)
            raise ValueError("the loader stumbled")

        monkeypatch.setattr(model, "load_weights", stumbling, raising=False)
        fill(weights, random_state_dict(path))
        with pytest.raises(WeightcastError, match="the loader stumbled"):
            publisher.publish()
        assert offline.answers(llm) == before
        publisher.publish()
        assert offline.answers(llm) != before


def test_what_nobody_renews_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(model: nn.Module, helpers: str) -> list[Alias]:
        return []

    monkeypatch.setattr(twin, "aliases", none)
    path = build_tiny_model(tmp_path / "m", "mamba2", dtype="bfloat16")
    with offline.engine(path) as llm:
        before = offline.answers(llm)
        with (
            Publisher(random_state_dict(path), [llm], timeout_s=60) as publisher,
            pytest.raises(Unsupported, match=r"mixer\.conv_weights"),
        ):
            publisher.connect()
        assert offline.answers(llm) == before, "nothing of the engine was touched"


def test_a_copy_of_a_weight_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, not a view: made while the layer's kernel is chosen, from a weight that is landed in place."""
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader import base_loader

    from weightcast.engines.vllm import api

    process = base_loader.process_weights_after_loading

    def with_a_copy(model: nn.Module, *arguments: Any) -> None:
        process(model, *arguments)
        for layer in model.modules():
            if isinstance(layer, RMSNorm):
                layer.squared = layer.weight.detach() ** 2

    monkeypatch.setattr(base_loader, "process_weights_after_loading", with_a_copy)
    monkeypatch.setattr(api, "process_weights_after_loading", with_a_copy)
    path = build(tmp_path / "m", "qwen3")
    with (
        offline.engine(path) as llm,
        Publisher(random_state_dict(path), [llm], timeout_s=60) as publisher,
        pytest.raises(Unsupported, match=r"norm\.squared"),
    ):
        publisher.connect()


@pytest.mark.parametrize(("arch", "count"), [("qwen3", 1), ("deepseek_v3", 2)])
def test_a_large_models_twin_has_a_layer_of_each_kind(
    tmp_path: Path, arch: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = twin.api.build_twin

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(original(*arguments, **options)[0])
        return original(*arguments, **options)

    monkeypatch.setattr(twin.api, "build_twin", counted)
    monkeypatch.setattr(twin, "WHOLE_NBYTES", 0)
    path = build(tmp_path / "m", arch, num_hidden_layers=3)
    with offline.engine(path) as llm, Publisher(random_state_dict(path), [llm], timeout_s=60) as publisher:
        publisher.connect()
        assert made
        assert all(len(model.model.layers) == count for model in made)
        assert len(model_of(llm).model.layers) == 3


def test_a_parameter_that_the_loader_registers_is_landed_in(tmp_path: Path) -> None:
    """vLLM's Transformers backend registers phi's ``lm_head.bias`` whenever it loads one. It also changes transformers' classes, so
    all values are made before."""
    path = build_tiny_model(tmp_path / "m", "phi", dtype="bfloat16")
    weights, *others = (random_state_dict(path) for _ in range(3))
    seen = []
    with offline.engine(path) as llm, Publisher(weights, [llm], timeout_s=60) as publisher:
        for values in others:
            fill(weights, values)
            publisher.publish()
            assert torch.equal(model_of(llm).lm_head.bias[: len(values["lm_head.bias"])], values["lm_head.bias"])
            assert worker_of(llm).weight_transfer_engine.calls.engine.receiver._session.layout.through_loader == ()
            seen.append((save_checkpoint(tmp_path / f"{len(seen)}", values, like=path), offline.answers(llm)))
    for folder, got in seen:
        with offline.engine(folder) as llm:
            assert offline.answers(llm) == got


@pytest.mark.parametrize(("arch", "refused"), [("qwen3", False), ("falcon_h1", True)])
def test_without_room_for_a_twin_only_what_the_loader_writes_is_refused(
    tmp_path: Path, arch: str, refused: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(twin, "free_nbytes", lambda device: 0)
    path = build_tiny_model(tmp_path / "m", arch, dtype="bfloat16", head_dim=32)
    with (
        offline.engine(path) as llm,
        Publisher(random_state_dict(path), [llm], timeout_s=60) as publisher,
    ):
        if refused:
            with pytest.raises(ShadowError, match="a twin of it"):
                publisher.connect()
        else:
            publisher.connect()
            assert "were not looked for" in caplog.text
