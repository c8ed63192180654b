"""What a Publisher is given: what it cannot do is refused, not ignored."""

from __future__ import annotations

import gc
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from weightcast import Publisher
from weightcast.errors import InvalidInput, StateError, Unsupported, WeightcastError
from weightcast.sources import SafetensorsSource, StateDictSource, make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.fleet.addresses import address_towards

WEIGHTS = {"w": torch.randn(4, 5)}


def test_a_dtype_that_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    for source in (tmp_path, str(tmp_path), SafetensorsSource(tmp_path), StateDictSource(WEIGHTS)):
        make_source(source)
        with pytest.raises(InvalidInput, match="no effect") as caught:
            make_source(source, dtype=torch.bfloat16)
        assert caught.value.field == "dtype"
    assert make_source(WEIGHTS, dtype=torch.bfloat16).manifest["w"].dtype == "bfloat16"


def test_a_closed_publisher_keeps_no_memory_while_it_is_still_referenced() -> None:
    engine = LocalEngine("local", [DictModel({"w": torch.zeros(4, 5)})])
    publisher = Publisher(WEIGHTS, [engine], transport="shm", timeout_s=20)
    with publisher:
        assert publisher.publish().digests_match
        assert "memfd:weightcast" in Path("/proc/self/maps").read_text()
    engine.stop()
    gc.collect()
    assert "memfd:weightcast" not in Path("/proc/self/maps").read_text()
    publisher.close()


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf")])
def test_no_time_is_not_the_default_time(timeout_s: float) -> None:
    engine = LocalEngine("local", [DictModel({"w": torch.zeros(4, 5)})])
    with Publisher(WEIGHTS, [engine], timeout_s=20) as publisher:
        for call in (publisher.connect, publisher.publish, lambda **time: publisher.add(engine, **time)):
            with pytest.raises(InvalidInput) as caught:
                call(timeout_s=timeout_s)
            assert caught.value.field == "timeout_s"
        assert publisher.publish().digests_match
    engine.stop()


@pytest.mark.parametrize(
    ("addresses", "refused"),
    [(["2001:db8::7"], True), (["2001:db8::7", "192.0.2.7"], False), (["::1"], False), ([], False)],
)
def test_engines_on_hosts_without_ipv4_are_refused_by_name(
    addresses: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *rest: object, **more: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    if refused:
        with pytest.raises(Unsupported, match=r"six\.invalid has IPv6 addresses only"):
            address_towards({"six.invalid"})
    else:
        assert address_towards({"six.invalid"}) == "127.0.0.1"


@pytest.mark.parametrize("value", [3, None, [1.0], WEIGHTS["w"].numpy()], ids=["int", "none", "list", "numpy"])
def test_a_mapping_with_what_is_no_tensor_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidInput, match=f"'w' is no torch tensor, but of type {type(value).__name__}") as caught:
        make_source({"a": WEIGHTS["w"], "w": value})  # type: ignore[dict-item]
    assert caught.value.field == "source"


def viewed(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor whose values are not what lies in its memory, and its values."""
    if kind == "zeros":
        return torch._efficientzerotensor(64), torch.zeros(64)
    conjugate = torch.randn(64, dtype=torch.complex64).conj()
    made = (
        conjugate
        if kind == "conjugate"
        else conjugate.imag
        if kind == "imaginary"
        else torch._neg_view(torch.randn(64))
    )
    return made, made.resolve_conj().resolve_neg().clone()


KINDS = ["conjugate", "imaginary", "negative", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_whose_memory_does_not_hold_its_values_is_refused(kind: str) -> None:
    module = torch.nn.Linear(3, 3)
    module.view = torch.nn.Parameter(viewed(kind)[0], requires_grad=False)
    with pytest.raises(Unsupported, match="'view' is a view whose values torch makes"):
        make_source(module)
    module.view = torch.nn.Parameter(module.view.resolve_conj().resolve_neg().clone(), requires_grad=False)
    make_source(module)


@pytest.mark.parametrize("kind", ["imaginary", "negative"])
def test_a_parameter_that_becomes_such_a_view_is_refused_in_the_next_round(kind: str) -> None:
    module = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.randn(64), requires_grad=False)})
    engine = LocalEngine("local", [DictModel({"w": torch.zeros(64)})])
    with Publisher(module, [engine], timeout_s=20, transport="tcp") as publisher:
        publisher.publish()
        live = module["w"].clone()
        module["w"].data, values = viewed(kind)
        with pytest.raises(WeightcastError, match="w"):
            publisher.publish()
        assert engine.models[0].holds({"w": live})
        module["w"].data = values
        publisher.connect()
        publisher.publish()
        assert engine.models[0].holds({"w": values})
    engine.stop()


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "conjugated": torch.Tensor.conj,
    "negated": torch._neg_view,
    "transposed": torch.Tensor.t,
    "of another shape": lambda value: value.view(8, 2),
    "of another type": lambda value: value.view(torch.int64),
}


def square(way: str) -> torch.nn.ParameterDict:
    dtype = torch.complex64 if way == "conjugated" else torch.float64
    return torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.randn(4, 4, dtype=dtype), requires_grad=False)})


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_is_seen_in_another_way_where_it_lies_is_told(way: str, transport: str) -> None:
    module = square(way)
    engine = LocalEngine("local", [DictModel({"w": torch.zeros_like(module["w"])})])
    with Publisher(module, [engine], timeout_s=20, transport=transport) as publisher:
        publisher.publish()
        live, seen = module["w"].clone(), module["w"].data
        module["w"].data = WAYS[way](seen)
        for _ in range(2):
            with pytest.raises(StateError, match=r"'w'.* Call connect\(\)"):
                publisher.publish()
            assert engine.models[0].holds({"w": live})
        module["w"].data = seen
        module["w"].copy_(torch.randn(4, 4))
        publisher.publish()
        assert engine.models[0].holds({"w": module["w"].clone()})
    engine.stop()


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_parameter_beside_shards_that_is_seen_in_another_way_where_it_lies_is_told(
    way: str, alone: DeviceMesh
) -> None:
    module = square(way)
    module["shard"] = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), alone, [Shard(0)]))
    source = make_source(module)
    source.refresh()
    seen = module["w"].data
    module["w"].data = WAYS[way](seen)
    for look in (source.refresh, source.check_form):
        with pytest.raises(StateError, match=r"'w'.* Call connect\(\)"):
            look()
    module["w"].data = seen
    source.refresh()


@pytest.mark.parametrize("what", ["state dict", "stream"])
def test_values_that_torch_makes_when_they_are_read_are_published_where_they_are_copied(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightcast.cpu.WORTH_NBYTES", 0)  # blocks are copied and digested at once
    given: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}

    def renew() -> None:
        for kind in KINDS:
            given[kind], values[kind] = viewed(kind)

    renew()
    engine = LocalEngine("local", [DictModel({kind: torch.zeros_like(value) for kind, value in values.items()})])
    with Publisher(given if what == "state dict" else lambda: iter(given.items()), [engine], timeout_s=20) as publisher:
        for _ in range(3):
            renew()
            publisher.publish()
            assert engine.models[0].holds(values)
    engine.stop()


def refused(source: Any) -> None:
    engine = LocalEngine("local", [DictModel({"a": torch.zeros(4, 5)})])
    try:
        with Publisher(source, [engine], timeout_s=20) as publisher:
            publisher.publish()
    finally:
        engine.stop()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", [dict, lambda tensors: lambda: iter(tensors.items())], ids=["state dict", "stream"])
def test_tensors_that_have_no_plain_values_are_refused_by_name(what: Callable[[dict[str, Any]], Any]) -> None:
    with FakeTensorMode():
        fake = torch.randn(3)
    parts = [torch.randn(2), torch.randn(3)]
    for value in (fake, *(torch.nested.nested_tensor(parts, layout=kind) for kind in (torch.strided, torch.jagged))):
        with pytest.raises(Unsupported, match="'w'"):
            refused(what({"a": WEIGHTS["w"], "w": value}))


def test_names_that_are_no_text_are_told_so() -> None:
    with pytest.raises(InvalidInput, match="names that are no text"):
        make_source({1: WEIGHTS["w"]})  # type: ignore[dict-item]


def test_a_lazy_module_that_never_ran_is_refused_by_name() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LazyLinear(4))
    with pytest.raises(Unsupported, match=r"'1\.weight' belongs to a lazy module.*Run the module once"):
        make_source(module)
    module(torch.randn(5, 2))
    assert make_source(module).manifest["1.weight"].shape == (4, 3)


def test_a_name_that_cannot_be_written_is_refused_before_an_engine_is_asked() -> None:
    with pytest.raises(InvalidInput, match="cannot be written as UTF-8"):
        make_source({"w\ud800": WEIGHTS["w"]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value.tolist(), "of type list"),
        (lambda value: value.to("meta"), "without values (on the meta device)"),
        (lambda value: value.to_sparse(), "in the layout torch.sparse_coo"),
    ],
    ids=["list", "meta", "sparse"],
)
def test_a_mapping_whose_tensor_became_something_else_is_a_named_error_and_heals(
    change: Callable[[torch.Tensor], Any], told: str
) -> None:
    tensors: dict[str, Any] = {"w": torch.randn(4, 5), "a": torch.empty(0), "z": torch.randn(3)}
    engine = LocalEngine("local", [DictModel(tensors)])
    with Publisher(tensors, [engine], timeout_s=20) as publisher:
        publisher.publish()
        kept = {name: value.clone() for name, value in tensors.items()}
        tensors["w"] = change(tensors["w"])
        with pytest.raises(StateError, match="'w' was .* at connect.* and is .*" + re.escape(told)):
            publisher.publish()
        assert engine.models[0].holds(kept)
        tensors |= {"w": torch.randn(4, 5), "a": torch.empty(0)}
        publisher.publish()
        assert engine.models[0].holds(tensors)
    engine.stop()


@pytest.mark.parametrize("engines", [3, torch.nn.Linear(2, 2)], ids=["int", "module"])
def test_engines_that_are_no_list_are_told_so(engines: Any) -> None:
    with pytest.raises(InvalidInput, match=f"engines is a list, not one {type(engines).__name__}") as caught:
        Publisher(WEIGHTS, engines)
    assert caught.value.field == "engines"


@pytest.mark.parametrize("engine", [3, torch.nn.Linear(2, 2)], ids=["int", "module"])
def test_what_is_no_engine_is_refused_before_anything_is_called(engine: Any) -> None:
    with pytest.raises(InvalidInput, match=f"is no engine, but of type {type(engine).__name__}") as caught:
        Publisher(WEIGHTS, [engine])
    assert caught.value.field == "engines"


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "5", None])
@pytest.mark.parametrize("field", ["timeout_s", "silence_s"])
def test_seconds_are_a_positive_number(field: str, seconds: Any) -> None:
    with pytest.raises(InvalidInput, match="is a positive number of seconds") as caught:
        Publisher(WEIGHTS, [], **{field: seconds})
    assert caught.value.field == field
