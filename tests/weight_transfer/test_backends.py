"""The contract of backends: how they are named, built lazily, checked and driven, and that a third party can add one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from weightcast import Publisher
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.receiver.base import LiveModel
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.vllm_protocol.nccl.worker import VllmNcclEngine
from weightcast.weight_transfer import (
    InitInfo,
    UpdateInfo,
    WeightTransferConfig,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WorkerRank,
)
from weightcast.weight_transfer.weightcast import WeightcastEngine


class DirectInit(InitInfo, kw_only=True, forbid_unknown_fields=True):
    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise InvalidInput("factor is positive", field="factor")


class DirectUpdate(UpdateInfo, kw_only=True, forbid_unknown_fields=True):
    names: list[str]


class DirectEngine(WeightTransferEngine[DirectInit, DirectUpdate]):
    """A third party's backend: multiplies parameters in place."""

    init_info_cls = DirectInit
    update_info_cls = DirectUpdate

    def __init__(self, config: WeightTransferConfig, model: LiveModel, worker: WorkerRank) -> None:
        super().__init__(config, model, worker)
        self._factor, self._version = 1.0, "default"

    def init_transfer_engine(self, init_info: DirectInit) -> None:
        self._factor = init_info.factor

    def start_weight_update(self) -> None:
        return

    def update_weights(self, update_info: DirectUpdate) -> None:
        assert isinstance(self.model, DictModel)
        for name in update_info.names:
            self.model.parameters()[name].mul_(self._factor)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._version = weight_version or self._version

    def shutdown(self) -> None:
        return

    @property
    def weight_version(self) -> str:
        return self._version

    @property
    def dirty(self) -> bool:
        return False


@pytest.fixture
def factory() -> Iterator[type[WeightTransferEngineFactory]]:
    before = dict(WeightTransferEngineFactory._loaders)
    yield WeightTransferEngineFactory
    WeightTransferEngineFactory._loaders.clear()
    WeightTransferEngineFactory._loaders.update(before)


def model() -> DictModel:
    return DictModel({"w": torch.randn(3, 4), "b": torch.randn(5)})


def test_the_default_backend_is_found_by_its_entry_point(factory: type[WeightTransferEngineFactory]) -> None:
    assert "weightcast" in factory.names()
    engine = factory.create_engine(WeightTransferConfig(), model(), WorkerRank())
    assert isinstance(engine, WeightcastEngine)
    assert engine.weight_version == "default"
    engine.shutdown()
    engine.shutdown()


def test_a_third_party_backend_does_its_work(factory: type[WeightTransferEngineFactory]) -> None:
    factory.register_engine("direct", DirectEngine)
    live = model()
    before = live.parameters()["w"].clone()
    engine = factory.create_engine(
        WeightTransferConfig.of({"backend": "direct"}), live, WorkerRank(rank=1, world_size=2)
    )
    engine.init_transfer_engine(engine.parse_init_info({"factor": 2.0}))
    engine.start_weight_update()
    engine.update_weights(engine.parse_update_info({"names": ["w"]}))
    engine.finish_weight_update("7")
    assert torch.equal(live.parameters()["w"], before * 2)
    assert engine.weight_version == "7"
    with pytest.raises(InvalidInput, match="registered already"):
        factory.register_engine("direct", DirectEngine)


def test_a_backend_is_imported_when_it_is_asked_for(factory: type[WeightTransferEngineFactory]) -> None:
    factory.register_engine("later", "no_such_module_anywhere", "Engine")
    assert "later" in factory.names()
    with pytest.raises(Unsupported, match="no_such_module_anywhere"):
        factory.engine_class("later")
    with pytest.raises(Unsupported, match=r"Known: .*weightcast"):
        factory.engine_class("unheard")


@pytest.mark.parametrize(
    ("data", "field"),
    [({"factor": -1}, "factor"), ({"factor": "x"}, "factor"), ({}, "factor"), ({"factor": 1, "more": 2}, "more")],
)
def test_info_types_check_themselves(data: Mapping[str, Any], field: str) -> None:
    engine = DirectEngine(WeightTransferConfig(), model(), WorkerRank())
    with pytest.raises(InvalidInput, match=r"factor|more") as caught:
        engine.parse_init_info(data)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "value", [{"backend": ""}, {"mode": "sometimes"}, {"bakend": "weightcast"}, {"backend": 3}, "weightcast"]
)
def test_a_bad_config_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput):
        WeightTransferConfig.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(InvalidInput, match="not in a world"):
        WorkerRank(rank=rank, world_size=world_size)


def test_calls_in_the_wrong_order_are_state_errors() -> None:
    engine = WeightcastEngine(WeightTransferConfig(), model(), WorkerRank())
    update = engine.parse_update_info({"epoch": 1, "round": 1})
    for call in (engine.start_weight_update, lambda: engine.update_weights(update), engine.finish_weight_update):
        with pytest.raises(StateError):
            call()
    assert not engine.dirty
    nobody = {
        "address": "tcp://127.0.0.1:9",
        "public_key": zmq.curve_keypair()[0].decode(),
        "ticket": "t",
        "engine": "e",
        "timeout_s": 0.3,
    }
    with pytest.raises(Exception, match=r"did not answer|silent"):
        engine.init_transfer_engine(engine.parse_init_info(nobody))
    engine.shutdown()


REACHABLE = {"address": "tcp://h:1", "public_key": zmq.curve_keypair()[0].decode(), "ticket": "t", "engine": "e"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"public_key": "x"}, "public_key"),
        ({"address": "h:1"}, "address"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"ticket": None}, "ticket"),
        ({"nope": 1}, "nope"),
    ],
)
def test_the_default_backend_names_the_wrong_field_of_init_info(change: Mapping[str, Any], field: str) -> None:
    engine = WeightcastEngine(WeightTransferConfig(), model(), WorkerRank())
    assert engine.parse_init_info(REACHABLE).ticket == "t"
    with pytest.raises(InvalidInput, match=field) as caught:
        engine.parse_init_info({**REACHABLE, **change})
    assert caught.value.field == field
    with pytest.raises(InvalidInput) as caught:
        engine.parse_init_info({name: value for name, value in REACHABLE.items() if name != "engine"})
    assert caught.value.field == "engine"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"epoch": -1, "round": 1}, "epoch"),
        ({"epoch": 1, "round": -1}, "round"),
        ({"epoch": 1}, "round"),
        ({"epoch": 1, "round": 1, "action": "explode"}, "action"),
        ({"epoch": 1, "round": 1, "timeout_s": 0}, "timeout_s"),
    ],
)
def test_the_default_backend_names_the_wrong_field_of_update_info(data: Mapping[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        WeightcastEngine(WeightTransferConfig(), model(), WorkerRank()).parse_update_info(data)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"world_size": 1}, "rank_offset"),
        ({"master_port": 0}, "master_address"),
        ({"nccl_unique_id_b64": "?"}, "nccl_unique_id_b64"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_the_nccl_backend_names_the_wrong_field(change: Mapping[str, Any], field: str) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"))
    worker = VllmNcclEngine(WeightTransferConfig(backend="nccl"), gpu, WorkerRank())  # type: ignore[arg-type]
    good = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    with pytest.raises(InvalidInput) as caught:
        worker.parse_init_info({**good, **change})
    assert caught.value.field == field


def test_a_round_without_an_update_names_no_version() -> None:
    engine = LocalEngine("local", [model()])
    worker, weights = engine.workers[0], {"w": torch.randn(3, 4), "b": torch.randn(5)}
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        version = publisher.publish().version
        for _ in range(2):
            worker.start_weight_update()
            with pytest.raises(StateError, match="no update was carried out"):
                worker.finish_weight_update("bogus")
            assert worker.weight_version == version
        assert publisher.publish().digests_match
    engine.stop()


def test_a_round_without_an_update_leaves_an_nccl_engine_dirty() -> None:
    gpu = SimpleNamespace(device=torch.device("cuda"))
    worker = VllmNcclEngine(WeightTransferConfig(backend="nccl"), gpu, WorkerRank())  # type: ignore[arg-type]
    worker._comm, worker._dirty = object(), True  # type: ignore[assignment]
    worker.start_weight_update()
    worker.finish_weight_update()
    assert worker.dirty


def test_workers_that_do_not_know_how_many_they_are_learn_it_from_the_trainer() -> None:
    """Replicas of vLLM: each counts itself and those before it."""
    weights = {"w": torch.randn(3, 4), "b": torch.randn(5)}
    engine = LocalEngine("replicas", [model(), model()])
    engine.workers = [
        WeightcastEngine(WeightTransferConfig(), live, WorkerRank(rank=rank, world_size=rank + 1))
        for rank, live in enumerate(engine.models)
    ]
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        report = publisher.publish()
    assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
    assert all(live.holds(weights) for live in engine.models)


@pytest.mark.parametrize(("size", "named"), [(0, "at least 1"), (1, "not in a world")])
def test_a_world_that_a_worker_is_not_in_is_refused(size: int, named: str) -> None:
    engine = WeightcastEngine(WeightTransferConfig(), model(), WorkerRank(rank=1, world_size=2))
    info = {
        "address": "tcp://127.0.0.1:9",
        "public_key": zmq.curve_keypair()[0].decode(),
        "ticket": "t",
        "engine": "e",
        "world_size": size,
    }
    with pytest.raises(InvalidInput, match=named):
        engine.init_transfer_engine(engine.parse_init_info(info))
