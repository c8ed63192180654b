"""Every published tensor has a place in every engine, or the user has said that it needs none; tensors that share one are equal."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from tests.sync.test_several_ranks import process_group
from torch import nn

from weightcast import Publisher
from weightcast.errors import InvalidInput, PlanMismatch, RoundFailed
from weightcast.layout import Layout
from weightcast.manifest import Manifest
from weightcast.manifest.names import patterns_for, renaming_hint
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

Weights = dict[str, torch.Tensor]
SHAPES = {
    "embed.weight": (34, 12),
    "layers.0.q.weight": (12, 12),
    "layers.0.norm.weight": (12,),
    "layers.1.q.weight": (12, 12),
    "layers.1.norm.weight": (12,),
    "head.weight": (34, 12),
}
UNTIED = "have different values|are not those of"


def random_weights(without: Sequence[str] = ()) -> Weights:
    return {name: torch.randn(shape) for name, shape in SHAPES.items() if name not in without}


def refill(weights: Weights, *, tied: bool) -> None:
    for value in weights.values():
        value.copy_(torch.randn_like(value))
    if tied:
        weights["head.weight"].copy_(weights["embed.weight"])


@pytest.fixture
def start() -> Iterator[Callable[[Sequence[DictModel]], LocalEngine]]:
    made: list[LocalEngine] = []

    def start(models: Sequence[DictModel], mode: str = "auto") -> LocalEngine:
        made.append(LocalEngine(f"engine {len(made)}", models, mode=mode))
        return made[-1]

    yield start
    for engine in made:
        engine.stop()


Start = Callable[..., LocalEngine]


def workers(tensors: Mapping[str, torch.Tensor], kind: str, **options: object) -> list[DictModel]:
    """One worker, two that hold rows, or two of which each has some tensors."""
    if kind == "one":
        return [DictModel(tensors, **options)]  # type: ignore[arg-type]
    if kind == "rows":
        return [DictModel(tensors, rows=(rank, 2), **options) for rank in range(2)]  # type: ignore[arg-type]
    names = sorted(tensors)
    return [DictModel({name: tensors[name] for name in half}) for half in (names[::2], names[1::2])]


def held(engine: LocalEngine, name: str) -> list[torch.Tensor]:
    return [model.parameters()[name].clone() for model in engine.models if name in model.parameters()]


def arrived(engine: LocalEngine, weights: Weights) -> bool:
    """Whether every worker's live values are the weights', by rows where it has rows."""
    return all(
        torch.equal(live, model._slice(name, weights[name]).to(live.dtype))
        for model in engine.models
        for name, live in model.parameters().items()
    )


@pytest.mark.parametrize("kind", ["one", "rows", "parts"])
def test_a_tensor_without_a_place_is_named_and_may_be_left_out(start: Start, kind: str) -> None:
    weights = random_weights()
    without = ("layers.1.q.weight", "layers.1.norm.weight", "layers.0.norm.weight")
    engine = start(workers(random_weights(without), kind))
    before = {name: held(engine, name) for name in SHAPES}
    with (
        Publisher(weights, [engine], timeout_s=20) as publisher,
        pytest.raises(PlanMismatch, match=r"no place for 3 of 6 published tensors: .*layers\.1\.") as caught,
    ):
        publisher.connect()
    assert (caught.value.engine, caught.value.phase) == (engine.name, "join")
    assert all(map(torch.equal, before[name], held(engine, name)) for name in SHAPES)
    assert 'unused=["layers.0.norm.*", "layers.1.*"]' in str(caught.value)
    with Publisher(weights, [engine], unused=["layers.0.norm.*", "layers.1.*"], timeout_s=20) as publisher:
        for _ in range(2):
            refill(weights, tied=False)
            report = publisher.publish()
            assert report.unused == ("layers.0.norm.weight", "layers.1.norm.weight", "layers.1.q.weight")
            assert "without 3 unused tensors" in str(report)
            assert arrived(engine, weights)


class Clipping(DictModel):
    """Takes as many rows of a larger tensor as fit, as loaders of some engines do."""

    def layout(self, manifest: Manifest) -> Layout:
        fits = {spec.name: self.parameters()[spec.name].shape[0] for spec in manifest.tensors}
        cut = Manifest.of(msgspec.structs.replace(s, shape=(fits[s.name], *s.shape[1:])) for s in manifest.tensors)
        return super().layout(cut)


def test_a_larger_model_is_refused_where_the_engine_would_take_a_part_of_it(start: Start) -> None:
    small = random_weights()
    larger = {name: torch.randn(value.shape[0] + 2, *value.shape[1:]) for name, value in small.items()}
    larger["layers.0.norm.weight"] = torch.randn(small["layers.0.norm.weight"].shape)
    engine = start([Clipping(small)])
    with (
        Publisher(larger, [engine], timeout_s=20) as publisher,
        pytest.raises(PlanMismatch, match=r"5 of 6 .* only in part: embed.weight \(36, 12\) \(408 of 432 elements\)"),
    ):
        publisher.connect()
    assert engine.models[0].holds(small)
    with Publisher(larger, [engine], timeout_s=20, unused=["*"]) as publisher:
        assert set(publisher.publish().unused) == set(larger) - {"layers.0.norm.weight"}, "the user knows better"


@pytest.mark.parametrize("kind", ["one", "rows", "parts"])
def test_a_tensor_that_nobody_publishes_is_named(start: Start, kind: str) -> None:
    engine = start(workers(random_weights(), kind))
    with (
        Publisher(random_weights(("layers.1.q.weight",)), [engine], timeout_s=20) as publisher,
        pytest.raises(PlanMismatch, match=r"layers\.1\.q\.weight"),
    ):
        publisher.connect()


def test_workers_that_want_parts_of_a_model_make_up_the_whole(start: Start) -> None:
    weights = random_weights()
    engine = start(workers(random_weights(), "parts"))
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        refill(weights, tied=False)
        assert publisher.publish().unused == ()
        assert arrived(engine, weights)


def test_what_one_engine_leaves_out_another_may_want(start: Start) -> None:
    weights = random_weights()
    small, whole = start(workers(random_weights(("head.weight",)), "one")), start(workers(random_weights(), "one"))
    with Publisher(weights, [small, whole], unused=["head.*"], timeout_s=20) as publisher:
        refill(weights, tied=False)
        assert publisher.publish().unused == ("head.weight",)
        assert arrived(small, weights)
        assert torch.equal(held(whole, "head.weight")[0], weights["head.weight"])


@pytest.mark.parametrize("unused", ["head.*", 3, [3], [""], ["head.*", "haed.*"]])
def test_patterns_that_say_nothing_are_refused(start: Start, unused: object) -> None:
    engine = start(workers(random_weights(), "one"))
    with pytest.raises(InvalidInput) as caught:
        Publisher(random_weights(), [engine], unused=unused)  # type: ignore[arg-type]
    assert caught.value.field == "unused"
    assert "haed" in str(caught.value) or unused != ["head.*", "haed.*"]


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(34, 12), nn.Linear(12, 34, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 12, bias=False), "norm": nn.LayerNorm(12, bias=False)}) for _ in range(2)
        )
        if tied:
            self.head.weight = self.embed.weight


def tied_engine(
    start: Start, how: str, kind: str, dtype: torch.dtype = torch.float32, mode: str = "auto"
) -> LocalEngine:
    """An engine that keeps the head where the embedding lies, or that has no head at all."""
    tensors = {name: value.to(dtype) for name, value in random_weights(("head.weight",)).items()}
    tied = {"head.weight": "embed.weight"} if how == "shared" else None
    return start(workers(tensors, kind, tied=tied), mode)


@pytest.mark.parametrize("how", ["shared", "absent"])
@pytest.mark.parametrize("kind", ["one", "rows"])
def test_a_tied_module_and_a_tied_engine_need_no_word(
    start: Start, how: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Model(tied=True)
    engine = tied_engine(start, how, kind)
    with caplog.at_level(logging.WARNING), Publisher(module, [engine], timeout_s=20) as publisher:
        for _ in range(2):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            report = publisher.publish()
            assert report.digests_match
            assert report.unused == ()
            assert arrived(engine, dict(module.state_dict()))
        assert not caplog.records


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("how", ["shared", "absent"])
@pytest.mark.parametrize("kind", ["one", "rows"])
def test_equal_values_are_tied_and_unequal_ones_are_refused(start: Start, how: str, kind: str, mode: str) -> None:
    weights = random_weights()
    engine = tied_engine(start, how, kind, torch.bfloat16, mode)
    before = held(engine, "embed.weight")
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        with pytest.raises(PlanMismatch, match=UNTIED) as refused:
            publisher.connect()
        assert "'embed.weight'" in refused.value.message
        assert "'head.weight'" in refused.value.message
        assert all(map(torch.equal, before, held(engine, "embed.weight")))
        for number in (1, 2):
            refill(weights, tied=True)
            report = publisher.publish()
            assert (report.number, report.digests_match) == (number, True)
            assert arrived(engine, weights)
            served = held(engine, "embed.weight")
            weights["head.weight"].view(-1)[-1] += 1
            with pytest.raises(RoundFailed) as failed:
                publisher.publish()
            (cause,) = failed.value.causes.values()
            assert isinstance(cause, PlanMismatch)
            assert "'embed.weight'" in cause.message
            assert "'head.weight'" in cause.message
            assert failed.value.dirty == ()
            assert failed.value.serving == {engine.name: report.version}
            assert all(map(torch.equal, served, held(engine, "embed.weight")))


def test_with_live_only_the_engine_that_ties_is_dropped(start: Start) -> None:
    weights = random_weights()
    refill(weights, tied=True)
    tying, whole = tied_engine(start, "shared", "one"), start(workers(random_weights(), "one"))
    with Publisher(weights, [tying, whole], require="live", timeout_s=20) as publisher:
        assert publisher.publish().ok
        refill(weights, tied=False)
        report = publisher.publish()
        assert [engine.ok for engine in report.engines] == [False, True]
        assert "'head.weight'" in str(report.engines[0].error)
        assert arrived(whole, weights)
        refill(weights, tied=True)
        assert publisher.publish().ok
        assert arrived(tying, weights)


def ranks_publish(rank: int, size: int, folder: str) -> tuple[str, list[bool]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(17)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    engines = []
    if rank == 0:
        tensors = random_weights(("head.weight",))
        engines = [LocalEngine("tied", workers(tensors, "rows", tied={"head.weight": "embed.weight"}))]
    with process_group(rank, size, folder) as group:
        mesh = init_device_mesh("cpu", (size,))
        shards = {
            name: distribute_tensor(whole[name], mesh, [Shard(min(number % 2, whole[name].dim() - 1))])
            for number, name in enumerate(whole)
        }
        assert {shards[name].placements[0].dim for name in ("embed.weight", "head.weight")} == {0, 1}
        with Publisher(shards, engines, process_group=group, timeout_s=20) as publisher:
            try:
                publisher.connect()
                first = ""
            except PlanMismatch as error:
                first = error.message
            told = []
            for tied in (True, False, True):
                for name in whole:
                    whole[name] = torch.randn(SHAPES[name], generator=generator)
                if tied:
                    whole["head.weight"] = whole["embed.weight"]
                for name, shard in shards.items():
                    value = distribute_tensor(whole[name], mesh, shard.placements)
                    assert isinstance(value, DTensor)
                    shard.to_local().copy_(value.to_local())
                try:
                    publisher.publish()
                    told.append(not engines or arrived(engines[0], whole))
                except RoundFailed as error:
                    (cause,) = error.causes.values()
                    told.append("'head.weight'" not in str(cause))
    for engine in engines:
        engine.stop()
    return first, told


def test_several_trainer_ranks_compare_what_they_hold_in_different_cuts(tmp_path: Path) -> None:
    for first, told in run_ranks(ranks_publish, 2, str(tmp_path)):
        assert "'embed.weight' and 'head.weight' have different values" in first
        assert told == [True, False, True]


def test_patterns_take_what_they_should_and_no_more() -> None:
    placed = ["model.layers.0.q.weight", "model.layers.1.q.weight", "model.norm.weight"]
    for lost, wanted in (
        (["model.layers.2.q.weight", "model.layers.3.q.weight"], ["model.layers.2.*", "model.layers.3.*"]),
        (["model.layers.0.q.bias", "model.layers.1.q.bias"], ["model.layers.*.q.bias"]),
        (["v_head.summary.weight", "v_head.summary.bias"], ["v_head.*"]),
        (["scale"], ["scale"]),
        (["odd[1].*"], ["odd[[]1].*"]),
    ):
        assert patterns_for(lost, placed) == wanted


def test_a_prefix_that_differs_is_told() -> None:
    given = ["model.language_model.layers.0.q.weight", "model.language_model.embed.weight"]
    wanted = ["model.embed.weight", "model.layers.0.q.weight"]
    told = renaming_hint(given, wanted)
    assert told is not None
    assert "rename={'model.language_model.': 'model.'}" in told
    assert "'model.language_model.embed.weight'" in told
    assert renaming_hint(["model.layers.0.q.weight"], ["model.layers.2.q.weight"]) is None
    assert renaming_hint(["a.b"], ["c.d"]) is None
