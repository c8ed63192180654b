"""Sources at the start of a round: what has changed since connect is named, and new values are there when a round begins."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weightcast.errors import InvalidInput, StateError, Unsupported, WeightsMoved
from weightcast.sources import ModuleSource, SafetensorsSource, ShardedSource, Source, StateDictSource, make_source
from weightcast.sources.base import wait_for_stream
from weightcast.sources.shards import local_of


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    meeting = Path(tmp_path_factory.mktemp("mesh")) / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Shards, a replica and a plain tensor."""
    return {
        "a": distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)]),
        "plain": torch.arange(3),
        "b": distribute_tensor(torch.randn(5), mesh, [Replicate()]),
    }


def plain() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(6, 4), "plain": torch.arange(3), "b": torch.randn(5)}


def published(source: Source) -> dict[str, torch.Tensor]:
    memory = source.memory
    return {
        p.region.name: memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides).clone()
        for p in source.layout.placements
    }


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def both(mesh: DeviceMesh) -> list[dict[str, torch.Tensor]]:
    return [plain(), sharded(mesh)]


def test_mappings_are_read_again_whatever_became_of_their_tensors(mesh: DeviceMesh) -> None:
    for tensors, fresh in zip(both(mesh), both(mesh), strict=True):
        source = make_source(tensors)
        assert isinstance(source, StateDictSource | ShardedSource)
        for change in ("nothing", "values", "tensors"):
            if change == "values":
                tensors["b"].mul_(2)
            elif change == "tensors":
                tensors.update(fresh)
            source.refresh()
            assert {n: v.tolist() for n, v in published(source).items()} == {
                n: whole(v).tolist() for n, v in tensors.items()
            }


def test_a_parameter_in_place_of_a_tensor_is_no_change() -> None:
    tensors = plain()
    source = make_source(tensors)
    tensors["b"] = nn.Parameter(torch.ones(5))
    source.refresh()
    assert published(source)["b"].tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("b", lambda value: None, "'b' was published at connect.* and is gone"),
        ("a", lambda value: value.to(torch.bfloat16), "'a' was float32 .* and is bfloat16"),
        ("plain", lambda value: value[:2].clone(), r"'plain' was int64 \(3,\) .* and is int64 \(2,\)"),
    ],
)
def test_what_changed_is_named(
    mesh: DeviceMesh, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], message: str
) -> None:
    for tensors in both(mesh):
        source = make_source(tensors)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        with pytest.raises(StateError, match=message):
            source.refresh()


def test_a_tensor_whose_data_was_replaced_is_read_or_named() -> None:
    tensors = plain()
    source = make_source(tensors)
    tensors["b"].data = torch.ones(5)
    source.refresh()
    assert published(source)["b"].tolist() == [1.0] * 5
    tensors["b"].data = torch.ones(1)
    with pytest.raises(StateError, match=r"'b' was float32 \(5,\)"):
        source.refresh()


def test_a_tensor_that_was_resized_where_it_lies_is_named() -> None:
    tensors = plain()
    source = make_source(tensors)
    tensors["b"].resize_(1)
    with pytest.raises(StateError, match=r"'b' was float32 \(5,\)"):
        source.refresh()


def test_a_round_keeps_no_tensor_of_a_mapping_alive() -> None:
    tensors = plain()
    source = make_source(tensors)
    source.refresh()
    former = weakref.ref(tensors["a"])
    tensors.update(plain())
    assert former() is None
    source.refresh()


def test_other_placements_are_named(mesh: DeviceMesh) -> None:
    tensors = sharded(mesh)
    source = make_source(tensors)
    tensors["b"] = distribute_tensor(torch.randn(5), mesh, [Shard(0)])
    with pytest.raises(StateError, match=r"'b' was .*Replicate.* and is .*Shard"):
        source.refresh()
    tensors["b"] = torch.randn(5)
    with pytest.raises(StateError, match=r"'b' was .*Replicate.* and is float32 \(5,\)"):
        source.refresh()


def sharded_module(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
    return module


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_sharded_module_that_moved_is_refused_and_not_published_stale(mesh: DeviceMesh, mirrored: bool) -> None:
    module = sharded_module(mesh)
    source = make_source(module)
    assert isinstance(source, ShardedSource)
    if mirrored:
        source.rebind(type(source.memory)([storage.clone() for storage in source.memory.storages]))
    with torch.no_grad():
        module.weight.mul_(2)
    source.refresh()
    assert published(source)["weight"].tolist() == module.weight.to_local().tolist()
    module.to(torch.float64)
    with pytest.raises(StateError, match="moved since connect"):
        source.refresh()


def test_a_plain_module_that_moved_is_refused() -> None:
    module = nn.Linear(4, 4)
    source = make_source(module)
    assert isinstance(source, ModuleSource)
    source.refresh()
    module.weight.data = module.weight.data.clone()
    with pytest.raises(StateError, match="moved since connect"):
        source.refresh()


def test_memory_that_was_left_or_given_back_is_refused_before_it_is_read() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    source = make_source(module)
    source.fill()
    kept = module[1].weight.data
    module[1].weight.data = torch.randn(2, 5)
    for look in (source.fill, source.check):
        with pytest.raises(WeightsMoved, match="moved since connect"):
            look()
    module[1].weight.data = kept
    source.check()
    kept.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="moved since connect"):
        source.fill()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_tensors_that_moved_are_followed_in_the_same_layout(mesh: DeviceMesh, is_sharded: bool) -> None:
    """Not where they are other ones, or one of them changed its form."""
    module = sharded_module(mesh) if is_sharded else nn.Linear(4, 4)
    source = make_source(module)
    layout = source.layout
    for _ in range(3):
        module.double().float()
        with torch.no_grad():
            for value in module.parameters():
                local_of(value).copy_(torch.randn(local_of(value).shape))
        with pytest.raises(WeightsMoved):
            source.refresh()
        assert source.follow()
        assert source.layout is layout
        source.refresh()
        found = published(source)
        assert all(torch.equal(found[name], local_of(value)) for name, value in module.named_parameters())
    module.double()
    assert not _follows(source)
    module.float()
    module.bias = nn.Parameter(torch.randn(4))
    with pytest.raises(StateError, match="'bias' of the module was replaced"):
        source.follow()


def test_what_is_let_go_of_is_free_and_followed_afterwards() -> None:
    module, values = nn.Linear(4, 4), np.ones((4, 4), dtype=np.float32)
    module.weight.data = torch.from_numpy(values)
    source, watched = make_source(module), weakref.ref(values)
    source.refresh()
    del values
    assert source.let_go()
    assert watched() is not None
    module.weight.data = torch.randn(4, 4)
    assert watched() is None
    assert source.follow()
    source.refresh()
    assert torch.equal(published(source)["weight"], module.weight)


def _follows(source: Source) -> bool:
    try:
        return source.follow()
    except StateError:
        return False


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_module_whose_parameter_was_replaced_is_refused_by_name(mesh: DeviceMesh, is_sharded: bool) -> None:
    """The published parameter stays where it is, with the values that it had."""
    module = nn.Sequential(sharded_module(mesh) if is_sharded else nn.Linear(4, 4))
    source = make_source(module)
    source.refresh()
    before, new = module[0].weight, torch.randn(4, 4)
    module[0].weight = nn.Parameter(distribute_tensor(new, mesh, [Shard(0)]) if is_sharded else new)
    with pytest.raises(StateError, match=r"'0\.weight' of the module was replaced"):
        source.refresh()
    module[0].weight = before
    source.refresh()


def layered(mesh: DeviceMesh, is_sharded: bool) -> nn.Sequential:
    inner = nn.Sequential(sharded_module(mesh) if is_sharded else nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    inner.register_buffer("cache", torch.randn(2), persistent=False)
    return nn.Sequential(inner, nn.LayerNorm(4))


class WithAdapter(nn.Module):
    """A layer around another one, as adapters are put in place."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(4, 2)


CHANGES: list[tuple[str, Callable[[nn.Sequential], object]]] = [
    ("'1.weight' of the module was replaced", lambda m: setattr(m, "1", nn.LayerNorm(4))),
    ("'0.1.weight' of the module was replaced", lambda m: setattr(m[0], "1", nn.Linear(4, 4, bias=False))),
    (
        "'0.1.weight' of the module was replaced",
        lambda m: m[0][1].__setattr__("weight", nn.Parameter(torch.randn(4, 4))),
    ),
    ("'1.weight' is gone", lambda m: m.__delitem__(1)),
    ("'1.bias' is gone", lambda m: setattr(m[1], "bias", None)),
    ("'1.weight' is gone", lambda m: setattr(m, "1", WithAdapter(m[1]))),
    ("'0.1.weight' is gone", lambda m: nn.utils.parametrize.register_parametrization(m[0][1], "weight", nn.Identity())),
    ("'0.1.weight' is gone", lambda m: nn.utils.parametrizations.weight_norm(m[0][1])),
    ("'0.1.bias' came into the module", lambda m: setattr(m[0][1], "bias", nn.Parameter(torch.randn(4)))),
    ("'0.2.weight' came into the module", lambda m: m[0].append(nn.Linear(4, 4))),
    ("'1.steps' came into the module", lambda m: m[1].register_buffer("steps", torch.zeros(1))),
]


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(("message", "change"), CHANGES, ids=[f"{i}-{said}" for i, (said, _) in enumerate(CHANGES)])
def test_a_module_that_has_other_layers_is_refused_by_name(
    mesh: DeviceMesh, is_sharded: bool, message: str, change: Callable[[nn.Sequential], object]
) -> None:
    """What was published is no part of the module any more, or not all of it."""
    module = layered(mesh, is_sharded)
    source = make_source(module)
    source.refresh()
    change(module)
    for _ in range(2):
        with pytest.raises(StateError, match=message) as caught:
            source.refresh()
        assert "connect()" in str(caught.value.hint)
        with pytest.raises(StateError, match=message):
            source.check_form()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_what_is_no_part_of_a_checkpoint_may_come_and_go(mesh: DeviceMesh, is_sharded: bool) -> None:
    module = layered(mesh, is_sharded)
    source = make_source(module)
    before, norm = module[0].cache, module[1]
    for change in (
        lambda: module.append(nn.Dropout()),
        lambda: setattr(module[0], "cache", torch.randn(7)),
        lambda: module[1].register_buffer("scratch", torch.randn(3), persistent=False),
        lambda: module.__delitem__(2),
        lambda: setattr(module, "1", nn.LayerNorm(4)) or setattr(module, "1", norm),
    ):
        change()
        for _ in range(2):
            source.refresh()
    assert module[0].cache is not before
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(4))
    source.refresh()
    assert published(source)["1.weight"].tolist() == module[1].weight.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: setattr(weight, "data", weight.data.t()),
        lambda weight: setattr(weight, "data", weight.data[:2]),
        lambda weight: setattr(weight, "data", weight.data.view(torch.float16)[:, :4]),
    ],
)
def test_a_parameter_of_another_form_at_the_same_address_is_named(change: Callable[[torch.Tensor], object]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    source = make_source(module)
    change(module[1].weight)
    with pytest.raises(StateError, match=r"moved since connect\(\): '1\.weight'"):
        source.refresh()


def test_what_fsdp_puts_in_the_place_of_shards_for_a_while_is_no_replacement(mesh: DeviceMesh) -> None:
    module = sharded_module(mesh)
    source = make_source(module)
    module._parameters["weight"] = nn.Parameter(module.weight.full_tensor().detach())
    source.refresh()


def test_values_that_are_no_parameter_of_the_module_are_refused() -> None:
    """They would be read once, and published as they were then for ever."""
    module = nn.Linear(4, 4)
    names = {**dict(module.named_parameters()), "sum": module.weight.detach().sum(0)}
    with pytest.raises(InvalidInput, match="'sum' lies in no parameter") as caught:
        ModuleSource(module, names=names)
    assert caught.value.field == "source"


def test_a_checkpoint_staged_on_a_device_is_the_same_tensors_in_one_arena(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3, 5).to(torch.bfloat16), "odd": torch.arange(3, dtype=torch.uint8), **plain()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    mapped, files = published(source), source.memory.files
    assert {name: value.tolist() for name, value in mapped.items()} == {n: v.tolist() for n, v in tensors.items()}
    assert any(files)
    source._stage(torch.device("cpu"))
    assert (source.memory.is_arena, len(source.memory.storages), source.memory.files) == (True, 1, (None,))
    assert {n: v.tolist() for n, v in published(source).items()} == {n: v.tolist() for n, v in tensors.items()}
    source.refresh()


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("cuda", Unsupported, "no GPU cuda"),
        ("cuda:7", Unsupported, "no GPU cuda:7"),
        ("meta", Unsupported, "Choose cpu or cuda"),
        ("graphics", InvalidInput, "there is no device 'graphics'"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(error, match=message):
        SafetensorsSource(tmp_path, device=device)


def test_every_source_of_gpu_memory_waits_for_what_was_queued(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round's digests and copies run on streams of their own."""
    waits: list[torch.device] = []

    def current_stream(device: torch.device) -> types.SimpleNamespace:
        return types.SimpleNamespace(synchronize=lambda: waits.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    for given in (plain(), sharded(mesh), nn.Linear(4, 4), sharded_module(mesh)):
        source = make_source(given)  # type: ignore[arg-type]
        source.refresh()
        assert waits == []
        source.device = torch.device("cuda", 3)
        source.refresh()
        assert waits == [source.device]
        waits.clear()
    wait_for_stream(torch.device("cpu"))
    assert waits == []
