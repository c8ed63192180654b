"""Tensors that go through the engine's loader: two areas that take turns, and commits in which nothing fails once a version
is live."""

from __future__ import annotations

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import RoundFailed, ShadowError
from weightcast.layout import Layout
from weightcast.manifest import Manifest, TensorSpec
from weightcast.receiver import loader_area, place, shadow, staging
from weightcast.receiver.loader_area import LoadedTensors, LoaderArea, area_sizes, with_area
from weightcast.receiver.session import Session
from weightcast.receiver.shadow import Shadow
from weightcast.testing.local_engine import DictModel, LocalEngine

MANIFEST = Manifest.of(
    [
        TensorSpec(name="a", dtype="bfloat16", shape=(7, 33)),
        TensorSpec(name="b", dtype="float32", shape=(300,)),
        TensorSpec(name="c", dtype="bfloat16", shape=(5,)),
    ]
)
THROUGH = ("b", "c")


def fresh() -> dict[str, torch.Tensor]:
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {spec.name: torch.randn(spec.shape).to(kinds[spec.dtype]) for spec in MANIFEST.tensors}


def layout(through: tuple[str, ...] = THROUGH) -> Layout:
    return with_area(Layout(placements=(), storage_nbytes=(64,), through_loader=through), MANIFEST)


def allocate(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def fill(area: LoaderArea, values: dict[str, torch.Tensor]) -> None:
    for name, tensor in area.tensors():
        tensor.copy_(values[name])


def holds(tensors: loader_area.TensorPairs | None, values: dict[str, torch.Tensor]) -> bool:
    found = dict(tensors or ())
    return set(found) == set(THROUGH) and all(torch.equal(found[name], values[name]) for name in THROUGH)


def test_the_version_before_stays_until_the_next_round_overwrites_it() -> None:
    area, versions = LoaderArea(layout(), allocate, keeps=True), [fresh() for _ in range(4)]
    assert area.live_tensors() is None
    assert area.loaded() is None
    for number, version in enumerate(versions):
        fill(area, version)
        assert holds(area.tensors(), version)
        area.keep()
        assert holds(area.live_tensors(), version)
        if number:
            area.take_back()
            assert holds(area.live_tensors(), versions[number - 1])
            fill(area, version)
            area.keep()
    area.take_back()
    assert holds(area.live_tensors(), versions[-2])


def test_a_first_version_that_is_taken_back_leaves_none() -> None:
    area = LoaderArea(layout(), allocate, keeps=True)
    fill(area, fresh())
    area.keep()
    area.take_back()
    assert area.live_tensors() is None


def test_all_that_a_stay_needs_is_allocated_when_it_begins() -> None:
    sizes: list[int] = []

    def counted(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return allocate(nbytes)

    area = LoaderArea(layout(), counted, keeps=True)
    assert tuple(sizes) == area_sizes(layout(), None)
    assert area.nbytes == sum(sizes)
    values = fresh()
    fill(area, values)
    area.keep()
    kept = area.loaded()
    assert kept is not None
    sizes.clear()
    successor = LoaderArea(layout(), counted, keeps=True, loaded=kept)
    assert tuple(sizes) == area_sizes(layout(), kept)
    assert len(sizes) == 1
    assert holds(successor.live_tensors(), values)
    assert not holds(successor.tensors(), values)


def test_what_was_kept_for_other_tensors_is_no_way_back() -> None:
    kept = LoadedTensors(b"of another layout", allocate(4096))
    assert not kept.fits(layout())
    assert area_sizes(layout(), kept) == area_sizes(layout(), None)
    assert LoaderArea(layout(), allocate, keeps=True, loaded=kept).live_tensors() is None


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("relocatable", [True, False])
def test_a_shadow_swaps_there_and_back(copies: int, relocatable: bool) -> None:
    first, second = fresh(), fresh()
    model = DictModel(first, relocatable=relocatable)
    staged = Shadow(model, MANIFEST, model.layout(MANIFEST).placements, place.Place(model.device, copies))
    for storage, wanted in zip(staged.memory.storages, DictModel(second).memory().storages, strict=True):
        storage.copy_(wanted)
    if copies == 1 or not relocatable:
        staged.compile()
        staged.swap()
        assert model.holds(second)
        staged.swap()
        assert model.holds(first)
        assert staged.nbytes == copies * model.memory().nbytes


@pytest.mark.parametrize("relocatable", [True, False])
def test_rounds_and_their_way_back_allocate_nothing(monkeypatch: pytest.MonkeyPatch, relocatable: bool) -> None:
    model, other = DictModel(fresh(), relocatable=relocatable, through_loader=THROUGH), DictModel(fresh())
    engine, second = LocalEngine("a", [model], mode="staged"), LocalEngine("b", [other], mode="staged")
    tensors = fresh()
    with Publisher(tensors, [engine, second], timeout_s=20) as publisher:
        publisher.connect()

        def full(*args: object, **options: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        for module in (staging, shadow, place):
            if hasattr(module, "new_storage"):
                monkeypatch.setattr(module, "new_storage", full)
        for _ in range(3):
            report = publisher.publish()
            assert report.digests_match
            assert [worker.through_loader for e in report.engines for worker in e.workers] == [THROUGH, ()]
            assert model.holds(tensors)
            before = {name: value.clone() for name, value in tensors.items()}
            tensors.update(fresh())
            second.refuse("commit")
            with pytest.raises(RoundFailed):
                publisher.publish()
            assert model.holds(before)
            assert not engine.workers[0].dirty
            second.refuse()


def test_room_is_counted_for_both_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DictModel(fresh(), through_loader=THROUGH)
    areas = area_sizes(with_area(model.layout(MANIFEST), MANIFEST), None)
    needed = int((model.memory().nbytes + sum(areas)) * place.CHECK_HEADROOM) + 1
    monkeypatch.setattr(place, "free_nbytes", lambda device: needed)
    assert place.choose_place(model, areas, 1, host=True).copies == 1
    monkeypatch.setattr(place, "free_nbytes", lambda device: needed - areas[0])
    with pytest.raises(ShadowError):
        place.choose_place(model, areas, 1, host=True)


def test_a_commit_that_cannot_be_proven_is_live_and_said_to_be_until_it_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = DictModel(fresh(), relocatable=False, through_loader=THROUGH)
    engine, tensors = LocalEngine("a", [model], mode="staged"), fresh()
    with Publisher(tensors, [engine], timeout_s=20) as publisher:
        first = publisher.publish()
        before = {name: value.clone() for name, value in tensors.items()}
        tensors.update(fresh())
        seen: list[tuple[str, bool, bool]] = []
        rollback = engine.rollback

        def look(*args: object) -> None:
            worker = engine.workers[0]
            seen.append((worker.weight_version.partition("-")[0], worker.dirty, model.holds(tensors)))
            rollback(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(engine, "rollback", look)
            patched.setattr(staging.Target, "live_memory", _fails)
            with pytest.raises(RoundFailed, match="out of memory"):
                publisher.publish()
        assert seen == [("2", False, True)]
        assert model.holds(before)
        assert engine.workers[0].weight_version == first.version
        with monkeypatch.context() as patched:
            patched.setattr(Session, "digest_of", _fails_after(1, Session.digest_of))
            with pytest.raises(RoundFailed, match="out of memory"):
                publisher.publish()
        assert model.holds(before)
        assert publisher.publish().digests_match
        assert model.holds(tensors)


def _fails(*args: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _fails_after(count: int, real):  # type: ignore[no-untyped-def]
    """Calls of ``real``, the first few of which work."""
    calls: list[None] = []

    def call(*args: object) -> object:
        calls.append(None)
        return real(*args) if len(calls) <= count else _fails()

    return call


def test_an_in_place_round_leaves_no_former_values_to_go_back_to() -> None:
    """What an earlier staged round had loaded is not what is live after it."""
    model = DictModel(fresh(), through_loader=THROUGH)
    engine, tensors = LocalEngine("a", [model]), fresh()
    for mode in ("staged", "in_place"):
        with Publisher(tensors, [engine], mode=mode, timeout_s=20) as publisher:
            publisher.publish()
            assert model.holds(tensors)
            tensors.update(fresh())
    with Publisher(tensors, [engine], mode="staged", timeout_s=20) as publisher:
        model.fail_load = ValueError("the loader stumbled")
        with pytest.raises(RoundFailed) as failure:
            publisher.publish()
        assert failure.value.dirty == ("a",)
        assert engine.workers[0].dirty
        assert publisher.publish().digests_match
        assert model.holds(tensors)
        assert not engine.workers[0].dirty
