"""connect() looks at the source anew: whatever became of the user's tensors is published, and who cannot take it says which tensor."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from safetensors.torch import save_file
from test_several_ranks import agreed_seed, process_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from weightcast import Publisher
from weightcast.engines.embedded import LLM
from weightcast.errors import PlanMismatch, StateError, TransportError, Unsupported, WeightcastError
from weightcast.messages import LetGo
from weightcast.receiver.session import Session
from weightcast.receiver.worker_round import RoundId
from weightcast.sources import ModuleSource
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model
from weightcast.testing.ranks import run_ranks
from weightcast.trainer.ranks import other_rank


def policy() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 6, bias=False))
    module.register_buffer("steps", torch.randint(1, 9, (3,)))
    return module


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for value in module.state_dict().values():
        value.copy_(torch.randn(value.shape) * 9)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("a", [DictModel(state(policy()))])
    yield made
    made.stop()


def new_data(module: nn.Sequential) -> None:
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)


def one_new_data(module: nn.Sequential) -> None:
    module[2].weight.data = torch.randn(6, 20)


def assigned(module: nn.Sequential) -> None:
    module.load_state_dict(policy().state_dict(), assign=True)


def layer(module: nn.Sequential) -> None:
    module[0] = nn.Linear(6, 20)


def same_layer(module: nn.Sequential) -> None:
    module[0] = copy.deepcopy(module[0])
    randomise(module[0])


def tied(module: nn.Sequential) -> None:
    module[1].bias = module[1].weight


def swapped(module: nn.Sequential) -> None:
    torch.utils.swap_tensors(module[2].weight, nn.Parameter(torch.randn(6, 20)))


def wrapped(module: nn.Sequential) -> None:
    module[0] = torch.compile(module[0])


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "half": (lambda module: module.half(), "'0.weight', '0.bias', '1.weight' and 2 more"),
    "double": (lambda module: module.double(), "'0.weight'"),
    "assigned": (assigned, "'steps' of the module was replaced"),
    "layer": (layer, "'0.weight' of the module was replaced"),
    "same layer": (same_layer, "'0.weight' of the module was replaced"),
    "tied": (tied, "'1.bias' of the module was replaced"),
    "wrapped": (wrapped, "'0.weight' is gone"),
}
MOVES: dict[str, Callable[[nn.Sequential], object]] = {
    "there and back": lambda module: module.half().float(),
    "new data": new_data,
    "one new data": one_new_data,
    "swapped": swapped,
    "shared": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_is_another_one_is_published_after_connect(
    engine: LocalEngine, transport: str, name: str
) -> None:
    change, message = CHANGES[name]
    module = policy()
    with Publisher(module, [engine], transport=transport, timeout_s=30) as publisher:
        publisher.publish()
        before = state(module)
        randomise(module)
        change(module)
        for _ in range(2):
            with pytest.raises(StateError, match=message) as caught:
                publisher.publish()
            assert "Call connect()" in str(caught.value)
            assert engine.models[0].holds(before)
        version = publisher.versions["a"]
        publisher.connect()
        assert engine.models[0].holds(before)
        assert publisher.versions["a"] == version
        for number in (2, 3, 4):
            report = publisher.publish()
            assert (report.number, report.digests_match) == (number, True)
            assert engine.models[0].holds({n.replace("_orig_mod.", ""): v for n, v in state(module).items()})
            randomise(module)
        publisher.connect()
        publisher.publish()
        kept = state(module)
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())


def _count_inits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of engines that are asked to join, as they are."""
    inits: list[str] = []
    init = LocalEngine.init

    def counted(made: LocalEngine, *given: Any) -> None:
        inits.append(made.name)
        init(made, *given)

    monkeypatch.setattr(LocalEngine, "init", counted)
    return inits


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("name", MOVES)
def test_a_module_whose_tensors_move_every_step_is_published_by_the_same_connection(
    transport: str, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are set up anew with each move, and join once."""
    engine, other = (LocalEngine(each, [DictModel(state(policy()))], mode=mode) for each in "ab")
    inits = _count_inits(monkeypatch)
    module = policy()
    try:
        with Publisher(module, [engine, other], transport=transport, timeout_s=30) as publisher:
            for number in range(1, 5):
                randomise(module)
                if number != 3:  # in one round they lie still
                    MOVES[name](module)
                expected = state(module)
                report = publisher.publish()
                assert (report.number, report.digests_match) == (number, True)
                assert engine.models[0].holds(expected)
                assert other.models[0].holds(expected)
                assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
            assert sorted(inits) == ["a", "b"]
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    finally:
        engine.stop()
        other.stop()


def test_what_changed_before_the_first_round_is_published_and_not_undone(engine: LocalEngine) -> None:
    for calls_connect in (False, True):
        module = policy()
        with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
            module.half()
            layer(module)
            randomise(module)
            expected = state(module)
            if calls_connect:
                publisher.connect()
            publisher.publish()
            assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
            assert engine.models[0].holds(expected)


def test_an_engine_joins_in_and_the_users_values_stay_theirs(engine: LocalEngine) -> None:
    """The memory would move with an engine that needs another transport: not with values that are of before."""
    module = policy()
    other = LocalEngine("b", [DictModel(state(module))])
    try:
        with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
            publisher.publish()
            new_data(module)
            expected = state(module)
            with pytest.raises(WeightcastError, match=r"moved since connect\(\)"):
                publisher.add(other)
            assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
            publisher.connect()
            publisher.add(other)
            publisher.publish()
            assert engine.models[0].holds(expected)
            assert other.models[0].holds(expected)
    finally:
        other.stop()


def test_a_mapping_of_another_form_is_published_after_connect(engine: LocalEngine) -> None:
    tensors = state(policy())
    with Publisher(tensors, [engine], timeout_s=30) as publisher:
        publisher.publish()
        tensors.update(
            {name: torch.randn(value.shape).half() for name, value in tensors.items() if value.is_floating_point()}
        )
        with pytest.raises(
            StateError, match=r"'0\.bias' was float32 \(20,\) at connect\(\) and is float16.*Call connect"
        ):
            publisher.publish()
        publisher.connect()
        publisher.publish()
        assert engine.models[0].holds(tensors)
        tensors["new"] = torch.randn(3)
        with pytest.raises(StateError, match=r"'new' came into the mapping.*Call connect"):
            publisher.publish()
        with pytest.raises(PlanMismatch, match="new"):
            publisher.connect()
        del tensors["new"]
        with pytest.raises(WeightcastError, match="new"):
            publisher.publish()
        publisher.connect()
        publisher.publish()
        assert engine.models[0].holds(tensors)


def test_other_files_of_a_folder_are_published_after_connect(engine: LocalEngine, tmp_path: Path) -> None:
    for number in range(2):
        tensors = state(policy())
        save_file(tensors, tmp_path / "model.safetensors")
        if number == 0:
            publisher = Publisher(tmp_path, [engine], timeout_s=30)
        else:
            with pytest.raises(StateError, match=r"changed since connect.*Call connect"):
                publisher.publish()
            publisher.connect()
        publisher.publish()
        assert engine.models[0].holds(tensors)
    publisher.close()


def test_what_cannot_be_published_changes_nothing(engine: LocalEngine) -> None:
    module = policy()
    with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
        publisher.publish()
        weight = module[2].weight
        module[2].weight = nn.Parameter(torch.empty(6, 20, device="meta"))
        for _ in range(2):
            with pytest.raises(Unsupported, match=r"2\.weight"):
                publisher.connect()
            with pytest.raises(StateError, match=r"'2\.weight' of the module was replaced"):
                publisher.publish()
        module[2].weight = weight
        randomise(module)
        publisher.publish()
        assert engine.models[0].holds(state(module))


def test_a_source_that_the_user_made_is_not_made_anew(engine: LocalEngine) -> None:
    module = policy()
    with Publisher(ModuleSource(module), [engine], timeout_s=30) as publisher:
        publisher.publish()
        module.half()
        with pytest.raises(StateError, match=r"moved since connect.*Give Publisher the module"):
            publisher.connect()


def test_an_engine_that_cannot_take_the_new_form_names_the_tensor(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen3", tied=False)
    module = AutoModelForCausalLM.from_pretrained(folder)
    llm = LLM(str(folder), dtype="float32", device="cpu", max_model_len=64)

    def live() -> dict[str, torch.Tensor]:
        model = llm.engine.model
        return llm.run_between_steps(lambda: {n: v.clone() for n, v in model.state_dict().items()})

    with Publisher(module, [llm], timeout_s=30) as publisher:
        version = publisher.publish().version
        before = live()
        size = module.config.vocab_size
        module.resize_token_embeddings(size + 8)
        randomise(module)
        with pytest.raises(StateError, match=r"lm_head\.weight"):
            publisher.publish()
        for call in (publisher.connect, publisher.publish):
            with pytest.raises(WeightcastError) as caught:
                call()
            assert "embed_tokens.weight" in str(caught.value) or "lm_head.weight" in str(caught.value)
        assert set(publisher.versions.values()) == {version}
        assert all(torch.equal(value, before[name]) for name, value in live().items())
        module.resize_token_embeddings(size)
        publisher.connect()
        publisher.publish()
        after = live()
        assert all(torch.equal(after[name], value) for name, value in module.state_dict().items())


def renew_on_ranks(rank: int, size: int, folder: str) -> list[str]:
    """FSDP2 modules and mappings of two ranks whose form changes, on both of them or on one."""
    versions = []
    with process_group(rank, size, folder):
        torch.manual_seed(agreed_seed())
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        for part in (*model, model):
            fully_shard(part)

        def whole() -> dict[str, torch.Tensor]:
            return {name: value.full_tensor() for name, value in model.state_dict().items()}

        tensors = whole()
        engines = [LocalEngine("a", [DictModel(tensors)])] if rank == 0 else []
        try:
            for transport in ("shm", "tcp"):
                with Publisher(
                    model, engines, process_group=dist.group.WORLD, transport=transport, timeout_s=30
                ) as publisher:
                    publisher.publish()
                    for change in (torch.float64, torch.float32):
                        model.to(change)
                        with torch.no_grad():
                            for parameter in model.parameters():
                                parameter.to_local().copy_(torch.randn(parameter.to_local().shape))
                        with pytest.raises(WeightcastError, match=r"since connect\(\)"):
                            publisher.publish()
                        publisher.connect()
                        for _ in range(2):
                            versions.append(publisher.publish().version)
                            tensors = whole()
                            assert all(engine.models[0].holds(tensors) for engine in engines)
            # Shards that lie elsewhere, on one rank or on both, are taken up where they are.
            with Publisher(model, engines, process_group=dist.group.WORLD, transport="tcp", timeout_s=30) as publisher:
                publisher.publish()
                if rank == 1:
                    # As if its weights were on a GPU from here on: transports are chosen by where they lie now.
                    facts = other_rank.local_facts
                    other_rank.local_facts = lambda *given, **more: replace(facts(*given, **more), gpu="GPU-1")  # type: ignore[attr-defined]
                for moving in ({1}, {0, 1}, {0}):
                    if rank in moving:
                        model.double().float()
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.to_local().copy_(torch.randn(parameter.to_local().shape))
                    versions.append(publisher.publish().version)
                    tensors = whole()
                    assert all(engine.models[0].holds(tensors) for engine in engines)
                if rank == 0:
                    assert [said.gpu for said in publisher._part._ranks.facts()] == ["", "GPU-1"]  # type: ignore[union-attr]
            with Publisher(model, engines, process_group=dist.group.WORLD, hold="round", timeout_s=30) as publisher:
                for number in range(3):
                    if number == rank:
                        model.double().float()
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.to_local().copy_(torch.randn(parameter.to_local().shape))
                    versions.append(publisher.publish().version)
                    assert mapped_arenas() == 0
                    tensors = whole()
                    assert all(engine.models[0].holds(tensors) for engine in engines)
        finally:
            for engine in engines:
                engine.stop()
    return versions


def mapped_arenas() -> int:
    """How many mappings of shared memory for weights this process has, as trainer and as worker."""
    return sum("memfd:weightcast" in line for line in Path("/proc/self/maps").read_text().splitlines())


def _holds_on(session: Session, order: LetGo) -> None:
    session.send_failure(RoundId(epoch=order.epoch, round=0), "release", TransportError("a transfer does not end"))


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["module", "mapping"])
def test_nothing_is_held_between_rounds_where_that_is_asked_for(
    transport: str, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side maps anything between calls; engines join once, also when weights moved, and one that holds on joins again."""
    gc.collect()
    others = mapped_arenas()  # of tests before this one
    engine, inits = LocalEngine("a", [DictModel(state(policy()))], mode=mode), _count_inits(monkeypatch)
    module = policy()
    source = module if kind == "module" else module.state_dict()
    lets_go = Session._let_go
    try:
        with Publisher(source, [engine], transport=transport, hold="round", timeout_s=30) as publisher:
            publisher.connect()
            for number in range(1, 5):
                randomise(module)
                if number == 2 and kind == "module":
                    new_data(module)
                if number == 4:
                    monkeypatch.setattr(Session, "_let_go", _holds_on)
                expected = state(module)
                report = publisher.publish()
                monkeypatch.setattr(Session, "_let_go", lets_go)
                assert (report.number, report.digests_match) == (number, True)
                assert engine.models[0].holds(expected)
                assert mapped_arenas() <= others or number == 4
                assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
            assert inits == ["a"]
            randomise(module)
            assert publisher.publish().number == 5
            assert inits == ["a", "a"]
            assert engine.models[0].holds(state(module))
    finally:
        engine.stop()


def test_a_layer_that_came_and_went_beside_a_refused_connect_is_told(engine: LocalEngine) -> None:
    module = policy()
    with Publisher(module, [engine], timeout_s=10) as publisher:
        publisher.publish()
        module.append(nn.Linear(6, 2))
        with pytest.raises(PlanMismatch, match="no place"):
            publisher.connect()
        del module[3]
        randomise(module)
        with pytest.raises(StateError, match=r"'3\.\w+' is gone from the module since connect\(\).*Call connect\(\)"):
            publisher.publish()
        publisher.connect()
        assert publisher.publish().digests_match
        assert engine.models[0].holds(state(module))


def test_every_rank_looks_at_its_part_anew(tmp_path: Path) -> None:
    told = run_ranks(renew_on_ranks, 2, str(tmp_path))
    assert told[0] == told[1]
    assert len(set(told[0])) == 14
