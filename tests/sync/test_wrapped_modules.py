"""Modules inside wrappers, mappings that make their tensors when they are asked, and tensors whose values are elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_modules import fill, new_model, random_seed, saved
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from weightcast import Publisher
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.sources import make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks


class Parallel(nn.Module):
    """As parallel wrappers of other libraries are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class WithValueHead(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy, self.v_head = model, nn.Linear(32, 1)


def layers_compiled(model: Any) -> nn.Module:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    return model  # type: ignore[no-any-return]


def layers_checkpointed(model: Any) -> nn.Module:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(checkpoint_wrapper(layer))
    return model  # type: ignore[no-any-return]


def parts_parallel(model: Any) -> nn.Module:
    model.model = DistributedDataParallel(model.model)
    return model  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,
    "each layer compiled": layers_compiled,
    "each layer checkpointed and compiled": layers_checkpointed,
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "another parallel wrapper": Parallel,
    "DDP compiled": lambda model: torch.compile(DistributedDataParallel(layers_compiled(model))),
    "compiled in DDP": lambda model: DistributedDataParallel(torch.compile(layers_checkpointed(model))),
    "DDP inside": parts_parallel,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one rank, which DDP asks for."""
    meeting = Path(tmp_path_factory.mktemp("group")) / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def three_rounds(source: Any, model: nn.Module, whole: nn.Module, folder: Path) -> None:
    """Publish fresh values three times and compare with what the same model writes without wrappers."""
    engine = LocalEngine("e", [DictModel(saved(whole, folder))])
    try:
        with Publisher(source, [engine], timeout_s=20) as publisher:
            for _ in range(3):
                seed = random_seed()
                fill(model, seed)
                fill(whole, seed)
                assert publisher.publish().digests_match
                assert engine.models[0].holds(saved(whole, folder))
    finally:
        engine.stop()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("way", WAYS)
def test_wrappers_are_seen_through(way: str, tmp_path: Path) -> None:
    """In modules, whose experts transformers fused as well, and by the check for what was replaced."""
    model, whole = new_model("qwen3_moe"), new_model("qwen3_moe")
    wrapped = WAYS[way](model)
    assert make_source(wrapped).manifest == make_source(whole).manifest
    three_rounds(wrapped, wrapped, whole, tmp_path)
    source = make_source(wrapped)
    source.refresh()
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    with pytest.raises(StateError, match=r"lm_head\.weight"):
        source.refresh()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("way", ["compiled", "each layer compiled", "DDP", "compiled in DDP"])
def test_wrappers_are_seen_through_in_state_dicts(way: str, tmp_path: Path) -> None:
    model, whole = new_model("gpt_oss"), new_model("gpt_oss")
    three_rounds(WAYS[way](model).state_dict(), model, whole, tmp_path)


def test_a_model_of_transformers_inside_another_module_has_its_checkpoint_s_names_there(tmp_path: Path) -> None:
    model = new_model("qwen3_moe")
    names = {f"policy.{name}" for name in saved(model, tmp_path)} | {"v_head.weight", "v_head.bias"}
    assert {spec.name for spec in make_source(WithValueHead(model)).manifest.tensors} == names


def test_parts_of_a_user_s_module_keep_their_names() -> None:
    """A part that happens to be called as parallel wrappers call theirs, and is not all there is or not at the top."""
    inner = nn.Sequential(Parallel(nn.Linear(2, 3)))
    assert {spec.name for spec in make_source(inner).manifest.tensors} == {"0.module.weight", "0.module.bias"}
    beside = Parallel(nn.Linear(2, 3))
    beside.scale = nn.Parameter(torch.randn(1))
    assert {spec.name for spec in make_source(beside).manifest.tensors} == {"module.weight", "module.bias", "scale"}
    assert {spec.name for spec in make_source(beside.state_dict()).manifest.tensors} == {
        "module.weight",
        "module.bias",
        "scale",
    }


def test_two_tensors_that_only_a_wrapper_tells_apart_are_refused() -> None:
    tensors = {"a.weight": torch.randn(2), "a._orig_mod.weight": torch.randn(2)}
    with pytest.raises(InvalidInput, match=r"'a\.weight' and 'a\._orig_mod\.weight' are both 'a\.weight'"):
        make_source(tensors)


def test_fsdp_with_flat_parameters_is_refused_by_name() -> None:
    flat = type("FullyShardedDataParallel", (Parallel,), {})(nn.Linear(2, 2))
    with pytest.raises(Unsupported, match="FSDP1") as caught:
        make_source(nn.Sequential(flat))
    assert "fully_shard" in str(caught.value)


def train_wrapped(rank: int, size: int, folder: str) -> list[str]:
    """FSDP2 with both ways of resharding, activation checkpointing and compilation; publishing at every point of a step."""
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    told = []
    for reshard in (True, False):
        torch.manual_seed(7)
        model = new_model("qwen3_moe").train()
        apply_activation_checkpointing(model, check_fn=lambda part: "DecoderLayer" in type(part).__name__)
        for layer in model.model.layers:
            fully_shard(layer, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        whole = new_model("qwen3_moe")
        tokens = torch.arange(12).reshape(2, 6) + 2
        model(tokens)  # parameters are gathered when the publisher looks first
        engines = [LocalEngine("e", [DictModel(saved(whole, Path(folder)))])] if rank == 0 else []
        source = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Publisher(source, engines, process_group=dist.group.WORLD, timeout_s=30) as publisher:
            for number in range(3):
                if number == 1:
                    model(tokens)
                elif number == 2:
                    model(tokens, labels=tokens).loss.backward()
                    optimizer.step()
                report = publisher.publish()
                told.append(report.version)
                state = {name: value.full_tensor() for name, value in model.state_dict().items()}
                whole.load_state_dict(state)
                if rank == 0:
                    assert engines[0].models[0].holds(saved(whole, Path(folder))), (reshard, number)
        for engine in engines:
            engine.stop()
    dist.destroy_process_group()
    return told


def test_fsdp_publishes_shards_whatever_is_gathered_meanwhile(tmp_path: Path) -> None:
    told = run_ranks(train_wrapped, 2, str(tmp_path), timeout_s=110)
    assert told[0] == told[1]
    digests = [version.partition("-")[2] for version in told[0]]
    assert digests[0] == digests[1] != digests[2]


class Lazy(dict[str, Any]):
    """A dict that makes its tensors when it is asked by index, and by nothing else."""

    def __init__(self, make: Callable[[str], torch.Tensor], names: list[str]) -> None:
        super().__init__(dict.fromkeys(names))
        self.make, self.asked = make, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        super().__getitem__(name)
        self.asked += 1
        return self.make(name)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_mapping_that_makes_its_tensors_is_asked_once_in_every_round(prefix: str) -> None:
    shapes = {"a": (6, 4), "b": (5,)}
    values: dict[str, torch.Tensor] = {}

    def fresh() -> None:
        values.update({name: torch.randn(shape) for name, shape in shapes.items()})

    fresh()
    lazy = Lazy(lambda name: values[name.removeprefix(prefix)] * 2, [prefix + name for name in shapes])
    engine = LocalEngine("e", [DictModel(values)])
    try:
        with Publisher(lazy, [engine], timeout_s=20) as publisher:
            publisher.connect()
            for _ in range(3):
                fresh()
                asked = lazy.asked
                publisher.publish()
                assert lazy.asked == asked + len(shapes)
                assert engine.models[0].holds({name: value * 2 for name, value in values.items()})
            dict.__delitem__(lazy, f"{prefix}b")
            with pytest.raises(StateError, match=r"'b' was published at connect.* and is gone"):
                publisher.publish()
    finally:
        engine.stop()


class Partitioned(nn.Linear):
    """A linear layer as ZeRO-3 leaves it, and DeepSpeed's way to the values."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("forgotten", torch.randn(3), persistent=False)
        self.values: dict[str, torch.Tensor] = {}
        for name, parameter in self.named_parameters():
            self.values[name] = torch.randn(parameter.shape)
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for parameter in parameters:
            parameter.data = self.values[names[id(parameter)]].clone()
        yield
        for parameter in parameters:
            parameter.data.fill_(float("nan"))
            parameter.data = torch.empty(0)


def test_zero_parameters_are_named_for_what_they_are_and_published_as_the_hint_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tests/frameworks has DeepSpeed's own."""
    from weightcast.integrations.deepspeed import gathered

    module = Partitioned()
    for source in (module, Parallel(module), dict(module.named_parameters())):
        with pytest.raises(Unsupported, match=r"weight' is a ZeRO-3 parameter: its values of shape \(3, 2\)") as caught:
            make_source(source)
        assert "from weightcast.integrations.deepspeed import gathered" in str(caught.value)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "deepspeed", sys)
        with pytest.raises(Unsupported, match=r"'weight' is empty, as DeepSpeed's ZeRO-3 leaves"):
            make_source(module.state_dict())
    with pytest.raises(Unsupported, match="deepspeed is not installed"):
        next(gathered(module))

    for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["deepspeed.runtime.zero"], "GatheredParameters", module.gathered, raising=False)
    engine = LocalEngine("e", [DictModel(module.values | {"kept": module.kept})])
    try:
        with Publisher(lambda: gathered(Parallel(module)), [engine], timeout_s=20) as publisher:
            for _ in range(3):
                for value in (*module.values.values(), module.kept):
                    value.copy_(torch.randn(value.shape))
                publisher.publish()
                assert engine.models[0].holds(module.values | {"kept": module.kept})
    finally:
        engine.stop()


def test_meta_tensors_are_named_for_what_they_are() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    for source in (module, module.state_dict()):
        with pytest.raises(Unsupported, match=r"'1\.weight' is on the meta device") as caught:
            make_source(source)
        assert "to_empty() and load_state_dict()" in str(caught.value)
    module[1].to_empty(device="cpu").load_state_dict(nn.Linear(2, 2).state_dict())
    make_source(module)


def test_a_parametrized_weight_is_named_for_what_it_is_and_published_as_the_hint_says() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    for source, name in ((module, "1.weight"), (module[1], "weight")):
        with pytest.raises(Unsupported, match=rf"'{name}' is computed from '.*original0' whenever") as caught:
            make_source(source)
        assert "__getitem__ makes the tensor" in str(caught.value)

    class Computing(Mapping[str, torch.Tensor]):
        names = ("0.weight", "0.bias", "1.weight", "1.bias")

        def __getitem__(self, name: str) -> torch.Tensor:
            path, last = name.split(".")
            return getattr(module.get_submodule(path), last).detach()  # type: ignore[no-any-return]

        def __iter__(self) -> Iterator[str]:
            return iter(self.names)

        def __len__(self) -> int:
            return len(self.names)

    def values() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in Computing().items()}

    engine = LocalEngine("e", [DictModel(values())])
    try:
        with Publisher(Computing(), [engine], timeout_s=20) as publisher:
            for _ in range(3):
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.copy_(torch.randn(parameter.shape))
                publisher.publish()
                assert engine.models[0].holds(values())
    finally:
        engine.stop()
