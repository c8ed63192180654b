"""Several models published as one: a mapping of prefixes to modules, or to mappings of tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weightcast import Publisher
from weightcast.cli.wording import in_options
from weightcast.engines.vllm.drafts import Draft, WithDraft, check_published
from weightcast.errors import InvalidInput, PlanMismatch, StateError
from weightcast.manifest import Manifest, TensorSpec
from weightcast.sources import make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.ranks.choice import _require_all_ranks

PREFIXES = {"": "", "draft.": "draft."}


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False)])


@pytest.fixture
def models() -> dict[str, Model]:
    return {"": Model(4), "draft.": Model(2)}


@pytest.fixture
def engine(models: dict[str, Model]) -> Iterator[LocalEngine]:
    names = {
        prefix + name: torch.randn_like(value) for prefix, m in models.items() for name, value in m.state_dict().items()
    }
    engine = LocalEngine("e", [DictModel(names)])
    yield engine
    engine.stop()


def live(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.models[0].parameters().items()}


@torch.no_grad()
def renewed(models: dict[str, Model]) -> dict[str, torch.Tensor]:
    """Fresh values for all of them, by published name."""
    for model in models.values():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
    return {prefix + name: value.clone() for prefix, m in models.items() for name, value in m.state_dict().items()}


@pytest.mark.parametrize("kind", ["modules", "state dicts", "lazy mappings", "folders"])
def test_every_round_brings_all_parts(models: dict[str, Model], engine: LocalEngine, kind: str, tmp_path: Path) -> None:
    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            return super().__getitem__(name) + 0

    sources: dict[str, Any] = {
        "modules": models,
        "state dicts": {prefix: model.state_dict() for prefix, model in models.items()},
        "lazy mappings": {prefix: Lazy(model.state_dict()) for prefix, model in models.items()},
        "folders": {prefix: tmp_path / (prefix or "m") for prefix in models},
    }
    for folder in sources["folders"].values():
        folder.mkdir()

    def save() -> None:
        for prefix, model in models.items():
            save_file(model.state_dict(), sources["folders"][prefix] / "model.safetensors")

    save()
    with Publisher(sources[kind], [engine], timeout_s=20) as publisher:
        for _ in range(3):
            wanted = renewed(models)
            if kind == "folders":
                save()
                publisher.connect()
            assert publisher.publish().digests_match
            got = live(engine)
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_renaming_is_of_names_with_prefixes(models: dict[str, Model]) -> None:
    for source in (models, {prefix: model.state_dict() for prefix, model in models.items()}):
        made = make_source(source, rename={"draft.layers.": "draft.blocks.", "embed": "wte"})
        names = {spec.name for spec in made.manifest.tensors}
        assert names == {"wte.weight", "layers.0.weight", "draft.embed.weight", "draft.blocks.0.weight"}


def test_a_layer_that_is_replaced_in_a_part_is_seen(models: dict[str, Model], engine: LocalEngine) -> None:
    with Publisher(models, [engine], timeout_s=20) as publisher:
        publisher.publish()
        models["draft."].layers[0] = nn.Linear(2, 2, bias=False)
        with pytest.raises(StateError, match=r"draft\.layers\.0\.weight"):
            publisher.publish()
        publisher.connect()
        wanted = renewed(models)
        publisher.publish()
        assert all(torch.equal(live(engine)[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"": Model(4), "draft.": Model(2).state_dict()}, "all modules, all mappings"),
        ({"": Model(4), "draft.": torch.zeros(3)}, "all modules, all mappings"),
        ({"": {"a.b": torch.zeros(3)}, "a.": {"b": torch.zeros(3)}}, "tensors of one name"),
        ({"draft": Model(4), "draft.": Model(4)}, "differ by more than dots"),
        ({3: Model(4)}, "text"),
        ({"w": torch.zeros(3), "path": "/tmp"}, "'path' is no torch tensor"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(source: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        Publisher(source, ["http://127.0.0.1:9"])
    assert caught.value.field == "source"


def test_ranks_are_told_by_any_part(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.trainer.ranks import choice

    replicated = object.__new__(DistributedDataParallel)
    nn.Module.__init__(replicated)
    replicated.process_group = None
    monkeypatch.setattr(choice.dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(choice.dist, "get_process_group_ranks", lambda _: [0, 1])
    with pytest.raises(InvalidInput, match="does not tell"):
        _require_all_ranks(models)
    _require_all_ranks({**models, "": replicated})


def test_a_draft_that_nobody_publishes_is_told_with_both_ways_out() -> None:
    """The loader of a pair takes what is published for each of the two, and an error says what to do where there is nothing."""
    whole = WithDraft(Model(4), Draft(Model(2), "eagle", None, is_of_same_checkpoint=False))
    target = Manifest.of([TensorSpec(name="embed.weight", dtype="float32", shape=(7, 4))])
    check_published(whole, Manifest.of([*target.tensors, TensorSpec(name="draft.fc", dtype="float32", shape=(2,))]))
    with pytest.raises(PlanMismatch, match="eagle") as caught:
        check_published(whole, target)
    assert '{"": model, "draft.": draft}' in caught.value.hint
    assert 'keep=["draft"]' in caught.value.hint
    told = in_options(caught.value)
    assert "--draft FOLDER" in told
    assert "--keep draft" in told
    with pytest.raises(InvalidInput, match="keep"):
        Publisher(Model(4), ["http://127.0.0.1:9"], keep=["model"])  # type: ignore[list-item]
