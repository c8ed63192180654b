"""Values that are NaN or infinite: counted in the report, or refused by the names of their tensors before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weightcast import InvalidInput, Publisher, Report, StateError, Unsupported
from weightcast.content.finite import non_finite
from weightcast.layout import Region
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of, name_of
from weightcast.plan import Copy
from weightcast.sources import StreamSource
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, dtype=torch.bfloat16))


@pytest.fixture
def engine(policy: nn.Module) -> Iterator[LocalEngine]:
    made = LocalEngine("a", [DictModel({n: torch.randn_like(v) for n, v in policy.state_dict().items()})])
    yield made
    made.stop()


def spoil(policy: nn.Module) -> dict[str, int]:
    """Put some values into the module; how many each tensor has."""
    with torch.no_grad():
        policy[0].weight[1, 2:5] = torch.tensor([NAN, -INF, INF])
        policy[2].bias[0] = NAN
        policy[1].bias.fill_(INF)
    return {"0.weight": 3, "1.bias": 5, "2.bias": 1}


def renew(policy: nn.Module) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_they_are_counted_and_published(policy: nn.Module, engine: LocalEngine, form: str) -> None:
    source = policy if form == "module" else policy.state_dict()
    with Publisher(source, [engine], timeout_s=20, check_finite="count") as publisher:
        assert publisher.publish().non_finite == {}
        wanted = spoil(policy)
        report = publisher.publish()
        assert report.non_finite == wanted
        assert Report.from_json(report.to_json()).non_finite == wanted
        assert "NaN or infinite: 9 values in 3 tensors" in str(report)
        assert engine.models[0].holds(policy.state_dict()), "every bit of them"
        renew(policy)
        assert publisher.publish().non_finite == {}


def test_they_are_refused_and_nothing_changes(policy: nn.Module, engine: LocalEngine) -> None:
    with Publisher(policy, [engine], timeout_s=20, check_finite=True) as publisher:
        before = publisher.publish()
        held = {name: value.clone() for name, value in policy.state_dict().items()}
        spoil(policy)
        with pytest.raises(
            StateError, match=r"3 of 6 tensors have values .*0\.weight \(3\), 0?.*2\.bias \(1\).*\"count\""
        ):
            publisher.publish()
        assert engine.models[0].holds(held)
        assert publisher.versions == {"a": before.version}
        renew(policy)
        report = publisher.publish()
        assert (report.number, report.non_finite) == (before.number + 1, {})
        assert engine.models[0].holds(policy.state_dict())


def test_nobody_counts_unless_asked(policy: nn.Module, engine: LocalEngine) -> None:
    spoil(policy)
    with Publisher(policy, [engine], timeout_s=20) as publisher:
        report = publisher.publish()
        assert report.non_finite is None
        assert "NaN" not in str(report)


def test_what_the_published_type_cannot_hold_counts(engine: LocalEngine, policy: nn.Module) -> None:
    renew(policy)
    with torch.no_grad():
        policy[0].weight[0, :2] = torch.tensor([70_000.0, -65_519.0])
    with Publisher(policy, [engine], dtype=torch.float16, timeout_s=20, check_finite="count") as publisher:
        assert publisher.publish().non_finite == {"0.weight": 1}, "65519 is rounded to 65504, 70000 to infinity"


def test_a_stream_and_another_word_are_refused_by_name(policy: nn.Module, engine: LocalEngine) -> None:
    with pytest.raises(InvalidInput, match="check_finite is True, False or \"count\", not 'yes'"):
        Publisher(policy, [engine], check_finite="yes")  # type: ignore[arg-type]
    with (
        Publisher(StreamSource(policy.state_dict().items), [engine], timeout_s=20, check_finite=True) as publisher,
        pytest.raises(Unsupported, match="check_finite for a stream"),
    ):
        publisher.publish()


@pytest.mark.parametrize("name", [n for n in DTYPE_NAMES if dtype_of(n).is_floating_point or dtype_of(n).is_complex])
def test_every_type_in_strided_boxes(name: str) -> None:
    dtype = dtype_of(name)
    values = torch.randn(6, 8).abs().clamp(0.5, 2).to(dtype)
    bad = [NAN] if name.endswith(("fnuz", "e4m3fn", "e8m0fnu")) else [NAN, INF, -INF]
    for number, value in enumerate(bad):
        values[number, 3] = torch.tensor(value, dtype=torch.float32).to(dtype)
        values[number, 7] = values[number, 3]  # outside of the box
    copy = Copy(
        region=Region(name="x", offsets=(0, 0), sizes=(6, 7)),
        src_storage=0,
        src_dtype=name,
        src_offset=0,
        src_strides=(8, 1),
        dst_storage=0,
        dst_dtype=name,
        dst_offset=0,
        dst_strides=(7, 1),
    )
    memory = Memory([values.view(torch.uint8).flatten()])
    assert name_of(values.dtype) == name
    assert non_finite([copy], memory) == {"x": len(bad)}


def _on_two_ranks(rank: int, size: int, folder: str) -> tuple[dict[str, int] | None, str]:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        torch.manual_seed(3)
        mesh = init_device_mesh("cpu", (size,))
        whole = {"rows": torch.randn(5, 4), "replica": torch.randn(3, 3)}
        held: dict[str, torch.Tensor] = {
            "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
            "replica": distribute_tensor(whole["replica"], mesh, [Replicate()]),
        }
        for value in held.values():
            assert isinstance(value, DTensor)
            value.to_local()[0, 0] = NAN
        engines = (
            [LocalEngine("a", [DictModel({n: torch.randn_like(v) for n, v in whole.items()})])] if rank == 0 else []
        )
        try:
            with Publisher(
                held, engines, process_group=dist.group.WORLD, timeout_s=20, check_finite="count"
            ) as publisher:
                counted = publisher.publish().non_finite
            with Publisher(held, engines, process_group=dist.group.WORLD, timeout_s=20, check_finite=True) as publisher:
                try:
                    publisher.publish()
                except StateError as error:
                    return counted, error.message
        finally:
            for engine in engines:
                engine.stop()
        return counted, ""
    finally:
        dist.destroy_process_group()


def test_values_of_all_ranks_are_counted_once(tmp_path: object) -> None:
    for counted, said in run_ranks(_on_two_ranks, 2, str(tmp_path), timeout_s=90):
        assert counted == {"replica": 1, "rows": 2}
        assert "rows (2), replica (1)" in said
