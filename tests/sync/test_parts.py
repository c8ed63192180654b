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


class Lazy(dict[str, torch.Tensor]):
    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name) + 0


KINDS = ["modules", "state dicts", "lazy mappings", "folders"]


def as_kind(kind: str, models: dict[str, Model], folder: Path) -> dict[str, Any]:
    """The models as a source of this kind; folders are written under ``folder``."""
    if kind == "modules":
        return dict(models)
    if kind != "folders":
        make = Lazy if kind == "lazy mappings" else dict
        return {prefix: make(model.state_dict()) for prefix, model in models.items()}
    for prefix, model in models.items():
        (folder / (prefix or "m")).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / (prefix or "m") / "model.safetensors")
    return {prefix: folder / (prefix or "m") for prefix in models}


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_brings_all_parts(models: dict[str, Model], engine: LocalEngine, kind: str, tmp_path: Path) -> None:
    with Publisher(as_kind(kind, models, tmp_path), [engine], timeout_s=20) as publisher:
        for _ in range(3):
            wanted = renewed(models)
            if kind == "folders":
                as_kind(kind, models, tmp_path)
                publisher.connect()
            assert publisher.publish().digests_match
            got = live(engine)
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("options", [{}, {"hold": "round"}], ids=["held", "of a round"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_replaced_is_published_or_told(
    engine: LocalEngine, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Before the first round, between rounds and for one that is not waited for: tensors are read where they are now; other modules
    and folders are taken up or refused until connect()."""
    source: dict[str, Any] = {}

    def replace(number: int) -> dict[str, torch.Tensor]:
        models = {"": Model(4), "draft.": Model(2)}
        wanted = renewed(models)
        source.update(as_kind(kind, models, tmp_path / str(number)))
        return wanted

    replace(0)
    with Publisher(source, [engine], timeout_s=20, **options) as publisher:
        for number in range(1, 5):
            before, wanted = live(engine), replace(number)
            refused: StateError | None = None
            try:
                report = publisher.publish() if number != 3 else publisher.publish(wait=False).wait()
            except StateError as error:
                refused = error
                publisher.connect()
                assert all(torch.equal(live(engine)[name], value) for name, value in before.items())
                report = publisher.publish()
            assert report.digests_match
            assert refused is None or (kind in ("modules", "folders") and "connect()" in refused.hint)
            assert all(torch.equal(live(engine)[name], value) for name, value in wanted.items()), number


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_come_and_go_are_told(
    models: dict[str, Model], engine: LocalEngine, kind: str, tmp_path: Path
) -> None:
    source = as_kind(kind, models, tmp_path)
    with Publisher(source, [engine], timeout_s=20) as publisher:
        publisher.publish()
        source["other."] = as_kind(kind, {"other.": Model(2)}, tmp_path)["other."]
        with pytest.raises(StateError, match="other") as caught:
            publisher.publish()
        assert "connect()" in caught.value.hint
        del source["other."], source["draft."]
        with pytest.raises(StateError, match=r"draft|folders"):
            publisher.publish()
        source["draft."] = torch.zeros(3)
        with pytest.raises(StateError, match=r"draft|folders"):
            publisher.publish()
        with pytest.raises(InvalidInput, match=r"all modules, all mappings|no torch tensor"):
            publisher.connect()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "a.module."])
def test_prefixes_may_be_any(kind: str, prefix: str, tmp_path: Path) -> None:
    """Also those that are names of a wrapper's part; wrappers in a part are seen through."""
    for prefixes in ([prefix], ["", prefix]):
        models = {prefix: Model(3) for prefix in prefixes}
        wanted = {f"{p}{name}": value for p, m in models.items() for name, value in m.state_dict().items()}
        wrapped: dict[str, Any] = models if kind == "folders" else {p: nn.DataParallel(m) for p, m in models.items()}
        made = make_source(as_kind(kind, wrapped, tmp_path))
        made.refresh()
        assert {spec.name for spec in made.manifest.tensors} == wanted.keys()
        for place in made.layout.placements:
            got = made.memory.view(place.storage, place.dtype, place.offset, place.region.sizes, place.strides)
            assert torch.equal(got, wanted[place.region.name])
        made.close()


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
