"""Layers that vLLM quantises: processed beside the running engine, and equal to a fresh load of the same checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.test_models import build, model_of, worker_of
from tests.vllm.weights import fill
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from weightcast import Publisher
from weightcast.engines.vllm.layer_twin import pairs_of, twin_of, unchanged
from weightcast.errors import RoundFailed, Unsupported
from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.testing.quantised_checkpoints import declare_quantised, quantised

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def receiver_of(llm: Any) -> Any:
    return worker_of(llm).weight_transfer_engine.calls.engine.receiver


def live_bytes(llm: Any) -> dict[str, torch.Tensor]:
    """All parameters of the engine's model, as bytes."""
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).clone()
        for name, value in model_of(llm).named_parameters()
        if value.numel()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("scheme", ["online", "float"])
def test_rounds_equal_fresh_loads(tmp_path: Path, scheme: str, mode: str) -> None:
    """Tokens, log-probabilities and bytes, twice in a row; a staged round that is taken back leaves what was before it."""
    path = build(tmp_path / "m", "qwen3", **WIDE)
    plain = [random_state_dict(path) for _ in range(3)]
    options = {"quantization": "fp8_per_channel"} if scheme == "online" else {}
    if scheme != "online":
        declare_quantised(path, scheme)
        plain = [quantised(weights, scheme) for weights in plain]
    folders = [save_checkpoint(tmp_path / f"{number}", weights, like=path) for number, weights in enumerate(plain)]
    seen = []
    with offline.engine(folders[0], **options) as llm:
        initial = live_bytes(llm)
        source = {name: value.clone() for name, value in plain[0].items()}
        with Publisher(source, [llm], timeout_s=60, mode=mode) as publisher:
            for weights in plain[1:]:
                fill(source, weights)
                assert publisher.publish().digests_match
                assert receiver_of(llm)._session.layout.through_loader == (), "nothing waits for vLLM's reload"
                seen.append((live_bytes(llm), offline.answers(llm)))
            if mode == "staged":
                receiver_of(llm).rollback(receiver_of(llm)._round.id)
                assert same(live_bytes(llm), seen[0][0])
                assert offline.answers(llm) == seen[0][1]
                with pytest.raises(RoundFailed, match="Call publish"):
                    publisher.publish()
                assert publisher.publish().digests_match
                assert same(live_bytes(llm), seen[1][0])
                assert offline.answers(llm) == seen[1][1]
    assert not same(initial, seen[0][0])
    assert seen[0][1] != seen[1][1]
    for folder, (values, answers) in zip(folders[1:], seen, strict=True):
        with offline.engine(folder, **options) as llm:
            assert same(live_bytes(llm), values)
            assert offline.answers(llm) == answers


def test_kernels_that_a_reload_leaves_stale_are_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU without AMX int8 layers lie in oneDNN's own memory. vLLM's reload has such layers answer with NaNs."""
    path = declare_quantised(build(tmp_path / "m", "qwen3", **WIDE), "int", symmetric=False)
    folder = save_checkpoint(tmp_path / "0", quantised(random_state_dict(path), "int"), like=path)
    with offline.engine(folder) as llm:
        before = offline.answers(llm)
        with (
            Publisher(quantised(random_state_dict(path), "int"), [llm], timeout_s=60) as publisher,
            pytest.raises(Unsupported, match=r"mlp\.down_proj\(\)"),
        ):
            publisher.connect()
        assert offline.answers(llm) == before, "nothing of the engine was touched"
    assert "dnnl_handler" in caplog.text, "why the layer is not processed beside the engine"


class Kernel:
    """What a layer's method keeps: a helper of vLLM's."""

    __module__ = "vllm.model_executor.toy"


class Handle:
    """Memory that is not torch's; given back at the end."""

    def __del__(self) -> None:
        pass


class Method(QuantizeMethodBase):
    """Doubles the weight after loading, and keeps what ``keep`` makes of the doubled weight on its kernel."""

    __module__ = "vllm.model_executor.toy"

    def __init__(self, keep: Callable[[torch.Tensor], object]) -> None:
        self.kernel, self.keep = Kernel(), keep

    def create_weights(self, layer: nn.Module, *arguments: Any, **named: Any) -> None: ...

    def apply(self, layer: nn.Module, *arguments: Any, **named: Any) -> torch.Tensor:
        return layer.weight

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter((layer.weight.detach() * 2).t(), requires_grad=False)
        self.kernel.kept = self.keep(layer.weight.detach())


def toy(keep: Callable[[torch.Tensor], object]) -> nn.Module:
    """A layer that vLLM would have built, recorded and processed."""
    layer = nn.Linear(4, 6, bias=False).requires_grad_(False)
    layer.quant_method = Method(keep)
    record_metadata_for_reloading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def test_a_twin_leaves_its_layer_and_finds_what_to_bring_over() -> None:
    layer = toy(lambda weight: [weight[0].clone(), {"same": weight}])
    weight, kept = layer.weight, layer.quant_method.kernel.kept
    values = [weight.clone(), kept[0].clone()]
    given = torch.rand(6, 4)
    twin = twin_of(layer)
    for _ in range(2):
        processed = twin.processed({"weight": nn.Parameter(given, requires_grad=False)})
        pairs = {pair.place: pair for pair in pairs_of(layer, processed)}
        assert set(pairs) == {"weight", "quant_method.kernel.kept[0]"}
        assert torch.equal(pairs["weight"].of(processed), given.t() * 2)
        assert torch.equal(pairs["quant_method.kernel.kept[0]"].of(processed), given.t()[0] * 2)
        assert layer.weight is weight
        assert layer.quant_method.kernel.kept is kept
        assert torch.equal(weight, values[0])
        assert torch.equal(kept[0], values[1])


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (lambda weight: float(weight.sum()), r"kernel\.kept depends on the weights"),
        (lambda weight: torch.tensor([weight.data_ptr()]), r"kernel\.kept may be addresses"),
        (lambda weight: Handle(), r"kernel\.kept is a Handle, which cannot be looked into"),
        (lambda weight: weight.clone()[:, ::2], r"kernel\.kept has gaps"),
        (lambda weight: torch.zeros(int(weight.sum().abs() * 1000) + 1), r"kernel\.kept is "),
        (lambda weight: lambda: weight, r"kernel\.kept is a function, which cannot be looked into"),
    ],
)
def test_what_bytes_do_not_bring_over_is_named(keep: Callable[[torch.Tensor], object], reason: str) -> None:
    layer = toy(keep)
    processed = twin_of(layer).processed({"weight": nn.Parameter(torch.rand(6, 4), requires_grad=False)})
    with pytest.raises(Unsupported, match=reason):
        pairs_of(layer, processed)


def test_a_layer_that_its_twin_would_change_is_put_back() -> None:
    shared = nn.Identity()

    def keep(weight: torch.Tensor) -> object:
        shared.kept = weight.clone()
        return shared

    layer = toy(keep)
    kept = shared.kept
    with pytest.raises(Unsupported, match="the layer's own Identity"), unchanged(layer):
        twin_of(layer).processed({"weight": nn.Parameter(torch.rand(6, 4), requires_grad=False)})
    assert shared.kept is kept
