"""The engine's end of weight transfer, with a backend of the test's own."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from engine_reference import greedy_on

from weightcast import Publisher
from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.errors import EngineError, InvalidInput, LoadError, StateError
from weightcast.weight_transfer import (
    InitInfo,
    UpdateInfo,
    WeightTransferConfig,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WorkerRank,
)


class JoinInfo(InitInfo, kw_only=True):
    world: int


class NoiseInfo(UpdateInfo, kw_only=True):
    seed: int
    names: list[str] = msgspec.field(default_factory=list)
    break_at: int | None = None


class NoiseEngine(WeightTransferEngine[JoinInfo, NoiseInfo]):
    """Adds seeded noise to parameters; ``break_at`` makes it fail half-way."""

    init_info_cls = JoinInfo
    update_info_cls = NoiseInfo

    def __init__(self, config: WeightTransferConfig, model: Any, worker: WorkerRank) -> None:
        super().__init__(config, model, worker)
        self.joined = 0
        self.version = "default"
        self.broken = False
        self.seeds: list[int] = []

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.joined += 1

    def start_weight_update(self) -> None:
        self.seeds.clear()

    def update_weights(self, update_info: NoiseInfo) -> None:
        self.broken = update_info.break_at is not None
        add_noise(self.model.model, update_info.seed, update_info.break_at)
        self.seeds.append(update_info.seed)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.version = weight_version or f"noise-{'-'.join(map(str, self.seeds))}"

    def shutdown(self) -> None:
        self.joined = 0

    @property
    def weight_version(self) -> str:
        return self.version

    @property
    def dirty(self) -> bool:
        return self.broken


def add_noise(model: Any, seed: int, break_at: int | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            if number == break_at:
                raise LoadError("the bytes ran out")
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise * parameter.std() * 0.4)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(WeightTransferEngineFactory, "_loaders", dict(WeightTransferEngineFactory._loaders))
    name = f"noise-{uuid.uuid4().hex[:6]}"
    WeightTransferEngineFactory.register_engine(name, NoiseEngine)
    return name


def _tokens(llm: LLM, prompt: list[int]) -> list[int]:
    return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0].token_ids


@pytest.mark.parametrize("shape", ["bare", "nested", "object", "list"])
def test_a_round(shape: str, backend: str, build: Any, start: Any) -> None:
    folder, reference = build("qwen3")
    llm = start(folder, weight_transfer_config={"backend": backend})
    prompt = [5, 9, 2, 77, 31]
    assert _tokens(llm, prompt) == greedy_on(reference, prompt, 9)
    init, update = {"world": 1}, {"seed": 41}
    wrap = {
        "bare": lambda name, value: value,
        "nested": lambda name, value: {name: value},
        "object": lambda name, value: SimpleNamespace(**{name: value}),
        "list": lambda name, value: {name: [value] if name == "update_info" else value},
    }[shape]
    llm.init_weight_transfer_engine(wrap("init_info", init))
    llm.start_weight_update()
    llm.update_weights(wrap("update_info", update))
    llm.finish_weight_update("17")
    assert llm.get_weight_version() == "17"
    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0]
    add_noise(reference, 41)
    assert output.token_ids == greedy_on(reference, prompt, 9)
    assert [(span.version, span.start, span.end) for span in output.weight_versions] == [("17", 0, 9)]
    status = llm.status()
    assert (status.weight_version, status.num_syncs, status.backend, status.world_size) == ("17", 1, backend, 1)
    llm.update_weight_version("renamed")
    assert llm.get_weight_version() == "renamed"
    llm.start_weight_update()
    llm.update_weights({"seed": 42})
    llm.finish_weight_update()
    assert llm.get_weight_version() == "noise-42"
    assert llm.get_world_size() == 1


def test_wrong_moments_and_values(backend: str, build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0], weight_transfer_config=WeightTransferConfig(backend=backend))
    for call in (llm.start_weight_update, lambda: llm.update_weights({"seed": 1}), llm.finish_weight_update):
        with pytest.raises(StateError, match="init_weight_transfer_engine"):
            call()
    with pytest.raises(InvalidInput) as caught:
        llm.init_weight_transfer_engine({"world": "many"})
    assert caught.value.field == "world"
    with pytest.raises(InvalidInput):
        llm.init_weight_transfer_engine(None)
    llm.init_weight_transfer_engine({"world": 1})
    for bad in ({"seed": 1, "extra": 2}, {}, [{"seed": 1}, 3], "x"):
        with pytest.raises(InvalidInput):
            llm.update_weights(bad)
    with pytest.raises(InvalidInput):
        llm.update_weight_version("")
    assert llm.get_weight_version() == "default"
    llm.shutdown_weight_transfer_engine()
    llm.shutdown_weight_transfer_engine()
    llm.init_weight_transfer_engine({"world": 1})
    assert llm.engine._transfer._engine.joined == 1


def test_waits_for_weights(backend: str, build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0], weight_transfer_config={"backend": backend, "wait_for_weights": True})
    assert not llm.status().ready
    with pytest.raises(StateError, match="waiting for the first weights"):
        llm.generate([[1, 2]])
    llm.init_weight_transfer_engine({"world": 1})
    llm.start_weight_update()
    llm.update_weights({"seed": 3})
    with pytest.raises(StateError, match="waiting"):
        llm.generate([[1, 2]])
    llm.finish_weight_update()
    assert llm.status().ready
    assert llm.status().reason == ""
    assert len(llm.generate([[1, 2]])) == 1


def test_a_round_without_weights_is_no_sync(backend: str, build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0], weight_transfer_config={"backend": backend, "wait_for_weights": True})
    llm.init_weight_transfer_engine({"world": 1})
    llm.start_weight_update()
    with pytest.raises(StateError, match="no weights came in"):
        llm.finish_weight_update("bogus")
    with pytest.raises(InvalidInput, match="empty list"):
        llm.update_weights([])
    llm.start_weight_update()
    with pytest.raises(LoadError):
        llm.update_weights([{"seed": 3}, {"seed": 3, "break_at": 1}])
    with pytest.raises(StateError, match="no weights came in"):
        llm.finish_weight_update("bogus")
    status = llm.status()
    assert (status.num_syncs, status.ready) == (0, False)
    assert "bogus" not in llm.get_weight_version()
    llm.start_weight_update()
    llm.update_weights({"seed": 3})
    llm.finish_weight_update("first")
    assert (llm.status().num_syncs, llm.status().ready, llm.get_weight_version()) == (1, True, "first")


@pytest.mark.parametrize("joined", [False, True])
def test_before_the_first_sync_there_is_no_digest(joined: bool, build: Any, start: Any) -> None:
    folder, reference = build("qwen3")
    llm = start(folder)
    if joined:
        with Publisher(reference, [llm], timeout_s=20) as publisher:
            publisher.connect()
            assert llm.status().digest is None
            digest = publisher.publish().digest
        assert llm.status().digest == digest
    else:
        assert llm.status().digest is None


def test_dirty_weights_serve_nothing(backend: str, build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0], weight_transfer_config={"backend": backend})
    llm.init_weight_transfer_engine({"world": 1})
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(llm.generate, [[4, 5]] * 3, SamplingParams(max_tokens=1500, ignore_eos=True))
        while llm.status().num_running < 3:
            assert not future.done()
        llm.start_weight_update()
        with pytest.raises(LoadError, match="ran out"):
            llm.update_weights({"seed": 3, "break_at": 4})
        with pytest.raises(EngineError, match="of no version"):
            future.result(30)
    status = llm.status()
    assert (status.dirty, status.ready, status.num_running, status.num_waiting) == (True, False, 0, 0)
    assert "of no version" in status.reason
    with pytest.raises(StateError, match="of no version"):
        llm.generate([[1, 2]])
    llm.start_weight_update()
    llm.update_weights({"seed": 3})
    llm.finish_weight_update("healed")
    assert llm.status().ready
    assert llm.generate([[1, 2]])[0].outputs[0].weight_versions[0].version == "healed"


def test_checksums_follow_the_weights(build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0])
    before = llm.checksums()
    weight = llm.engine.model.model.layers[1].mlp.up_proj.weight
    llm.run_between_steps(lambda: weight.data.view(-1)[3].add_(1))
    after = llm.checksums()
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    assert set(before) == set(after)


def test_parameters_may_move(build: Any, start: Any) -> None:
    """Storages are swapped between steps, as a staged commit does."""
    folder, reference = build("qwen3")
    llm = start(folder)
    prompt = [3, 1, 4, 1, 5]
    assert _tokens(llm, prompt) == greedy_on(reference, prompt, 9)

    def move() -> None:
        for parameter in llm.engine.model.parameters():
            fresh = parameter.data.clone()
            parameter.data.zero_()
            parameter.data = fresh
        add_noise(llm.engine.model, 8)

    llm.run_between_steps(move)
    add_noise(reference, 8)
    assert _tokens(llm, prompt) == greedy_on(reference, prompt, 9)
