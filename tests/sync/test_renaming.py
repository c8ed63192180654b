"""Names that differ in what only the user can know: the error says which, and publishing under other names works from any source."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.sync.test_several_ranks import process_group
from torch import nn

from weightcast import Publisher
from weightcast.engines.embedded import LLM
from weightcast.errors import InvalidInput, PlanMismatch
from weightcast.sources import SafetensorsSource, make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.ranks import run_ranks

SHAPES = {"model.embed.weight": (7, 4), "model.layers.0.q.weight": (4, 4), "head.weight": (5, 4)}
GIVEN = {name: name.replace("model.", "policy.language_model.") for name in SHAPES}
PREFIXES = {"policy.": "none.", "policy.language_model.": "model."}
"""Of two that fit the longer one counts."""


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4, bias=False)})])


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.ModuleDict({"language_model": Inner()})
        self.head = nn.Linear(4, 5, bias=False)


def by_function(name: str) -> str:
    return name.replace("policy.language_model.", "model.")


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine("e", [DictModel({name: torch.randn(shape) for name, shape in SHAPES.items()})])
    yield engine
    engine.stop()


def live(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.models[0].parameters().items()}


@pytest.mark.parametrize("rename", [PREFIXES, by_function], ids=["prefixes", "function"])
@pytest.mark.parametrize("kind", ["module", "state dict", "lazy mapping"])
def test_every_round_brings_values_under_their_new_names(engine: LocalEngine, kind: str, rename: Any) -> None:
    module = Wrapped()
    state: dict[str, torch.Tensor] = dict(module.state_dict())

    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return super().__getitem__(name) + 0

    source = {"module": module, "state dict": state, "lazy mapping": Lazy(state)}[kind]
    with Publisher(source, [engine], rename=rename, timeout_s=20) as publisher:
        for _ in range(3):
            fresh = {name: torch.randn(shape) for name, shape in SHAPES.items()}
            with torch.no_grad():
                for name, value in fresh.items():
                    state[GIVEN[name]].copy_(value)
                    if kind == "module":
                        module.get_parameter(GIVEN[name]).copy_(value)
            if kind == "state dict":
                state[GIVEN["head.weight"]] = fresh["head.weight"].clone()  # another object under the old name
            assert publisher.publish().digests_match
            assert all(torch.equal(value, live(engine)[name]) for name, value in fresh.items())


@pytest.mark.parametrize("rename", [PREFIXES, by_function], ids=["prefixes", "function"])
def test_a_checkpoint_folder(engine: LocalEngine, tmp_path: Path, rename: Any) -> None:
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file({GIVEN[name]: value for name, value in values.items()}, tmp_path / "model.safetensors")
    with Publisher(tmp_path, [engine], rename=rename, timeout_s=20) as publisher:
        publisher.publish()
    assert all(torch.equal(value, live(engine)[name]) for name, value in values.items())
    source = SafetensorsSource(tmp_path, rename=rename)
    assert all(torch.equal(value, source.tensor(name)) for name, value in values.items())
    source.close()


def ranks_publish(rank: int, size: int, folder: str) -> list[bool]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(5)
    engines = []
    if rank == 0:
        tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        engines = [LocalEngine("e", [DictModel(tensors, rows=(number, 2)) for number in range(2)])]
    with process_group(rank, size, folder) as group:
        mesh = init_device_mesh("cpu", (size,))
        shards = {
            GIVEN[name]: distribute_tensor(torch.zeros(shape), mesh, [Shard(number % 2)])
            for number, (name, shape) in enumerate(SHAPES.items())
        }
        arrived = []
        with Publisher(shards, engines, rename=PREFIXES, process_group=group, timeout_s=20) as publisher:
            for _ in range(2):
                whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
                for name, value in whole.items():
                    shard = shards[GIVEN[name]]
                    shard.to_local().copy_(distribute_tensor(value, mesh, shard.placements).to_local())
                publisher.publish()
                arrived += [model.holds(whole) for engine in engines for model in engine.models]
    for engine in engines:
        engine.stop()
    return arrived


def test_several_trainer_ranks(tmp_path: Path) -> None:
    assert run_ranks(ranks_publish, 2, str(tmp_path)) == [[True] * 4, []]


BAD: list[tuple[Any, str]] = [
    ({"policy.language_model.embed": "head"}, "of both"),
    (lambda name: "same", "of both"),
    (lambda name: None, "which is no name"),
    ({"policy.": 3}, "maps prefixes"),
    ("policy.", "mapping of prefixes or a function"),
]


@pytest.mark.parametrize(("rename", "told"), BAD, ids=[told for _, told in BAD])
def test_renamings_that_cannot_be(rename: Any, told: str, tmp_path: Path) -> None:
    state = Wrapped().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    for source in (Wrapped(), state, tmp_path):
        with pytest.raises(InvalidInput, match=told) as caught:
            make_source(source, rename=rename)
        assert caught.value.field == "rename"


def test_a_source_has_names_already(tmp_path: Path) -> None:
    save_file(Wrapped().state_dict(), tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    with pytest.raises(InvalidInput, match="no effect"):
        make_source(source, rename=PREFIXES)
    source.close()


PREFIXED: dict[str, tuple[Callable[[str], str], dict[str, str]]] = {
    "language_model": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        {"model.language_model.": "model."},
    ),
    "peft": (lambda name: f"base_model.model.{name}", {"base_model.model.": ""}),
    "none": (lambda name: name.removeprefix("model."), {"": "model.", "lm_head.": "lm_head."}),
}


@pytest.mark.parametrize("case", PREFIXED)
def test_the_error_says_what_to_rename_and_that_works(case: str, tmp_path: Path) -> None:
    path = build_tiny_model(tmp_path / "m", "qwen3")
    weights = random_state_dict(path)
    given_as, rename = PREFIXED[case]
    source = {given_as(name): value for name, value in weights.items()}
    llm = LLM(path, dtype="float32")
    try:
        if case != "none":  # transformers' own loading adds a prefix that is not there
            with (
                Publisher(source, [llm], timeout_s=20) as publisher,
                pytest.raises(PlanMismatch, match="rename=") as caught,
            ):
                publisher.connect()
            old, new = next(iter(rename.items()))
            said = str(caught.value)
            assert f"rename={{{old!r}: {new!r}}}" in said
            wanted = next(name for name in weights if repr(name) in said)
            assert repr(given_as(wanted)) in said
        with Publisher(source, [llm], rename=rename, timeout_s=20) as publisher:
            publisher.publish()
        parameters = dict(llm.engine.model.named_parameters())
        assert all(torch.equal(weights[name], value.detach()) for name, value in parameters.items())
    finally:
        llm.shutdown()


def test_files_are_not_changed(tmp_path: Path) -> None:
    state = Wrapped().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    make_source(tmp_path, rename=PREFIXES).close()
    assert set(load_file(tmp_path / "model.safetensors")) == set(state)
