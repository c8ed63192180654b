"""Hints about modules that are published merged, and about shards and checkpoints: the mistake, the hint, and the hint followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from tests.support.mistakes import Mistake
from tiny_adapters import assert_same, base, lora, merged, published, scatter
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, PlanMismatch, StateError, Unsupported
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.adapters import CONFIG_NAME, factor_names, factors_of
from weightcast.sources import SafetensorsSource, make_source, safetensors
from weightcast.sources.adapter import Adapter, adapter_named
from weightcast.sources.quantised import is_quantised, refuse_unknown
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model
from weightcast.trainer.clients.making import make_client
from weightcast.trainer.clients.vllm_dev import VllmDevClient

MERGED = r"Publish the merged weights: Publisher\(peft_model, engines\) without adapter="
MERGE = r"Publish what merge_and_unload\(\) returns"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def _read(given: Any) -> dict[str, torch.Tensor]:
    """What a source publishes in a round."""
    source = make_source(given)
    source.refresh()
    return published(source)


class Heads(nn.Module):
    """A layer of each kind that an adapter can be around and that is not merged here."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.bare = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


def _merges(model: Any) -> Callable[[], None]:
    """Do as MERGE says, and look that it is what PEFT computes."""

    def follow() -> None:
        scatter(model)
        whole = merged(model)
        assert_same(_read(dict(whole)), whole)

    return follow


def _attention() -> Mistake:
    model = get_peft_model(Heads(), lora(target_modules=["attention"], init_lora_weights=False))
    return Mistake(
        make=lambda: make_source(model), error=Unsupported,
        said="'attention' is a PEFT layer around a MultiheadAttention", hint=MERGE, follow=_merges(model),
    )  # fmt: skip


def _parametrized() -> Mistake:
    heads = Heads()
    nn.utils.parametrizations.orthogonal(heads.bare)
    model = get_peft_model(heads, lora(target_modules=["bare"]))
    return Mistake(
        make=lambda: make_source(model), error=Unsupported,
        said="'bare' is a PEFT layer around a ParametrizedLinear", hint=MERGE,
    )  # fmt: skip


def _eight_bits() -> Mistake:
    model = get_peft_model(Heads(), lora(target_modules=["bare"], init_lora_weights=False))
    layer = model.base_model.model.bare.base_layer
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)

    def widen() -> None:
        layer.weight = nn.Parameter(layer.weight.data.to(torch.bfloat16), requires_grad=False)
        _merges(model)()

    return Mistake(
        make=lambda: make_source(model), error=Unsupported, said=r"bare\.weight is quantised .*float8_e4m3fn",
        hint=f"{MERGE}.*where PEFT can merge this kind", follow=widen,
    )  # fmt: skip


def _biased() -> Mistake:
    model = get_peft_model(Heads(), lora(target_modules=["bare"], lora_bias=True))
    return Mistake(
        make=lambda: make_source(model).refresh(), error=Unsupported, said="PEFT cannot merge 'bare', a Linear: .*bias",
        hint=f"{MERGE}.*where PEFT can merge this kind",
    )  # fmt: skip


def _no_layers() -> Mistake:
    model = get_peft_model(base(), lora(init_lora_weights=False))
    model.add_adapter("nothing", lora(target_modules="dummy-target-modules"))

    def publish_merged() -> None:
        assert_same(_read(model), merged(model))

    return Mistake(
        make=lambda: Adapter(model, "nothing"), error=InvalidInput, said="the adapter 'nothing' has no LoRA layers",
        hint=MERGED, follow=publish_merged,
    )  # fmt: skip


def _half() -> Mistake:
    a, _ = factor_names("layers.0.q_proj")
    whole = [TensorSpec(name=name, dtype="float32", shape=(4, 4)) for name in factor_names("layers.0.q_proj")]
    config = TensorSpec(name=CONFIG_NAME, dtype="uint8", shape=(64,))
    return Mistake(
        make=lambda: factors_of(Manifest.of([TensorSpec(name=a, dtype="float32", shape=(4, 4)), config])),
        error=PlanMismatch, said="no whole adapter: layers.0.q_proj lacks A or B", hint=MERGED,
        follow=lambda: factors_of(Manifest.of([*whole, config])),
    )  # fmt: skip


def _no_plug_in() -> Mistake:
    engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(), loop=None)
    return Mistake(
        make=lambda: make_client(engine), error=Unsupported, said="has loaded no plug-in of weightcast's",
        hint="SGLANG_PLUGINS, if it is set, has to name weightcast",
    )  # fmt: skip


def _several() -> Mistake:
    model = get_peft_model(Heads(), lora(target_modules=["bare"]))
    model.add_adapter("other", lora(target_modules=["bare"]))
    return Mistake(
        make=lambda: adapter_named(model, "policy"), error=InvalidInput,
        said="has several adapters, and none of them is named 'policy'", hint="one of them: default, other",
        follow=lambda: make_source(model, adapter=adapter_named(model, "other")),
    )  # fmt: skip


def _replicas() -> Mistake:
    client: Any = VllmDevClient("http://127.0.0.1:9")
    sizes = {"true": 4, "false": 2}
    client._call = lambda method, path, deadline, query: {"world_size": sizes[query["include_dp"]]}

    def one_replica() -> None:
        sizes["true"] = 2
        assert client.world_size(Deadline(5)) == 2

    return Mistake(
        make=lambda: client.world_size(Deadline(5)), error=Unsupported, said="data-parallel replicas cannot be reached",
        hint="serve weightcast's own routes .*or start each replica as a server", follow=one_replica,
    )  # fmt: skip


class Int8Params(nn.Parameter):
    """By the name of bitsandbytes' type."""


def _packed_rows() -> Mistake:
    table = nn.Embedding(4, 2)
    table._parameters["weight"] = Int8Params(torch.zeros(4, 2, dtype=torch.int8), requires_grad=False)
    assert is_quantised(table)
    return Mistake(
        make=lambda: refuse_unknown(table, "rows"), error=Unsupported, said="'rows' is a quantised Embedding",
        hint="with its linear layers quantised only", follow=lambda: refuse_unknown(nn.Linear(2, 2), "rows"),
    )  # fmt: skip


def _moved_adapter() -> Mistake:
    model = get_peft_model(base(), lora(init_lora_weights=False))
    adapter = Adapter(model, "default")
    path = next(iter(adapter.layers))
    part = adapter.layers[path]
    parent, _, key = next(name for name, module in model.named_modules() if module is part).rpartition(".")
    setattr(model.get_submodule(parent), key, part.base_layer)

    def connect_anew() -> None:
        assert path not in Adapter(model, "default").layers

    return Mistake(
        make=adapter.check, error=StateError, said=f"the adapter 'default' is gone from '{path}' since connect",
        hint=r"connect\(\)", follow=connect_anew,
    )  # fmt: skip


def _longer_config() -> Mistake:
    model = get_peft_model(base(), lora(init_lora_weights=False))
    source: Any = make_source(model, adapter="default")
    for number, layer in enumerate(source._adapter.layers.values()):
        layer.scaling["default"] = number + 1 / 3

    def connect_anew() -> None:
        make_source(model, adapter="default").refresh()

    return Mistake(
        make=source.refresh, error=StateError, said="the config of the adapter is longer than at connect",
        hint=r"connect\(\)", follow=connect_anew,
    )  # fmt: skip


MISTAKES = [
    _packed_rows,
    _moved_adapter,
    _longer_config,
    _several,
    _replicas,
    _attention,
    _parametrized,
    _eight_bits,
    _biased,
    _no_layers,
    _half,
    _no_plug_in,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_not_merged_and_what_is_no_adapter(mistake: Callable[[], Mistake]) -> None:
    mistake().play()


def test_a_model_without_a_way_back_to_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, core_model_loading

    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "m", "qwen3_moe", "float32"))
    values = {name: value.detach() for name, value in model.named_parameters()}

    class Asked(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return values[name]

    def fails(*_: object) -> dict[str, Any]:
        raise NotImplementedError("one way only")

    def by_name() -> None:
        scatter(model)
        assert_same(_read(Asked(values)), values)

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", fails)
    Mistake(
        make=lambda: make_source(model), error=Unsupported, said="no way back to its checkpoint: one way only",
        hint="a mapping of checkpoint names whose __getitem__ makes the tensor", follow=by_name,
    ).play()  # fmt: skip


def test_more_tensors_than_one_checkpoint_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    values = {f"w{number}": torch.randn(4) for number in range(4)}
    for folder, names in (("whole", list(values)), ("part", list(values)[:3])):
        (tmp_path / folder).mkdir()
        save_file({name: values[name] for name in names}, tmp_path / folder / "model.safetensors")

    def publish_part() -> None:
        source = SafetensorsSource(tmp_path / "part")
        assert all(torch.equal(source.tensor(name), values[name]) for name in list(values)[:3])
        source.close()

    Mistake(
        make=lambda: SafetensorsSource(tmp_path / "whole"), error=InvalidInput, said="has more than 3 tensors",
        hint="Publish a part of it", follow=publish_part,
    ).play()  # fmt: skip


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank that is all there are."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_shard_that_is_not_what_its_tensor_says(mesh: DeviceMesh) -> None:
    local = torch.randn(3)
    wrong = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size([5]), stride=(1,))
    right = DTensor.from_local(local, mesh, [Shard(0)])
    Mistake(
        make=lambda: make_source({"w": wrong}), error=Unsupported, said=r"'w': the local shard is \(3,\).*make it \(5,\)",
        hint=r"a state dict with full_tensor\(\)",
        follow=lambda: assert_same(_read({"w": right.full_tensor()}), {"w": local}),
    ).play()  # fmt: skip


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("e", [DictModel({"w": torch.zeros(3)})])
    yield made
    made.stop()


def test_a_stream_of_shards(mesh: DeviceMesh, engine: LocalEngine) -> None:
    shard = DTensor.from_local(torch.randn(3), mesh, [Shard(0)])

    def publish(*, whole: bool) -> None:
        with Publisher(
            lambda: iter([("w", shard.full_tensor() if whole else shard)]), [engine], timeout_s=30
        ) as publisher:
            publisher.publish()
        assert engine.models[0].holds({"w": shard.to_local()})

    Mistake(
        make=lambda: publish(whole=False), error=Unsupported, said="'w' is a DTensor, of which this rank has a part only",
        hint=r"Yield whole tensors: full_tensor\(\), which all ranks call", follow=lambda: publish(whole=True),
    ).play()  # fmt: skip


def test_an_engine_that_cannot_sleep_is_not_woken(engine: LocalEngine) -> None:
    with Publisher({"w": torch.randn(3)}, [engine], timeout_s=30) as publisher:
        publisher.connect()
        Mistake(
            make=lambda: publisher.publish(wake=True), error=Unsupported, said="cannot sleep",
            hint="Publish without wake=", follow=publisher.publish,
        ).play()  # fmt: skip


def test_an_adapter_for_an_engine_of_whole_weights() -> None:
    model = get_peft_model(Heads(), lora(target_modules=["bare"], init_lora_weights=False))
    engine = LocalEngine("e", [DictModel(merged(model))])

    def publish(**options: Any) -> None:
        with Publisher(model, [engine], timeout_s=30, **options) as publisher:
            publisher.publish()

    try:
        Mistake(
            make=lambda: publish(adapter="default"), error=Unsupported, said="takes whole weights, and no adapters",
            hint=MERGED, follow=publish,
        ).play()  # fmt: skip
        assert engine.models[0].holds(merged(model))
    finally:
        engine.stop()
