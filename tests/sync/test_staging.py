"""Staged copies of parameters that may not move: one that is exchanged, two that are copied from in turn."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast import Publisher
from weightcast.content.layout_digest import LayoutDigest
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, RoundFailed, ShadowError
from weightcast.layout import Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.receiver import exchange, place, shadow, taking
from weightcast.receiver.staging import make_target
from weightcast.receiver.taking import taking_memory
from weightcast.room import host_room_nbytes
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import RankFailed, run_ranks
from weightcast.transports import shm

SHAPES = {"embed": (50, 33), "w": (128, 65), "scale": (7,), "norm": (64,)}


def fresh(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def stuck_engine(name: str, *, through_loader: tuple[str, ...] = ()) -> LocalEngine:
    model = DictModel(fresh(), relocatable=False, through_loader=through_loader)
    return LocalEngine(name, [model], mode="staged")


@pytest.mark.parametrize("through_loader", [(), ("norm",)])
@pytest.mark.parametrize("shadows", [1, 2])
def test_rounds_and_the_way_back(shadows: int, through_loader: tuple[str, ...]) -> None:
    first, second = stuck_engine("a", through_loader=through_loader), stuck_engine("b")
    tensors = fresh()
    with Publisher(tensors, [first, second], timeout_s=20, shadows=shadows) as publisher:
        for number in range(1, 6):
            before = {name: value.clone() for name, value in tensors.items()}
            tensors.update(fresh())
            if number % 2 == 0:

                def stumble(phase: str) -> None:
                    if phase == "commit":
                        second.before = lambda phase: None
                        raise RuntimeError("lost its way")

                second.before = stumble
                with pytest.raises((RoundFailed, RuntimeError)):
                    publisher.publish()
                assert first.models[0].holds(before)
                assert second.models[0].holds(before)
            report = publisher.publish()
            assert report.digests_match
            assert first.models[0].holds(tensors)
            assert second.models[0].holds(tensors)
        worker = report.engines[1].workers[0]
        direct = second.models[0].memory().nbytes
        assert worker.shadow_nbytes == shadows * direct
        assert worker.shadow == ("host memory, two copies" if shadows == 2 else "host memory")


@pytest.mark.parametrize(("mode", "shadows"), [("staged", 1), ("staged", 2), ("in_place", 1)])
def test_the_first_round_compiles_nothing_that_the_engine_waits_for(
    monkeypatch: pytest.MonkeyPatch, mode: str, shadows: int
) -> None:
    engine, tensors = LocalEngine("a", [DictModel(fresh(), relocatable=False)], mode=mode), fresh()
    before = {name: value.clone() for name, value in engine.models[0].parameters().items()}
    with Publisher(tensors, [engine], transport="shm", timeout_s=20, shadows=shadows) as publisher:
        publisher.connect()
        assert engine.models[0].holds(before)
        for made in (shadow.Exchange, shadow.CopyOut, shm.Replay, shm.ProvenReplay):
            complaint = f"{made.__name__} was compiled in a round"
            monkeypatch.setattr(made, "__init__", lambda *_, complaint=complaint: pytest.fail(complaint))
        if mode == "in_place":
            monkeypatch.setattr(LayoutDigest, "_compile", lambda *_: pytest.fail("a digest was compiled in a round"))
        assert publisher.publish().digests_match
        assert engine.models[0].holds(tensors)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("shadows", [1, 2])
def test_an_engine_that_leaves_frees_its_shadows_at_once(transport: str, shadows: int) -> None:
    """Not when the garbage collector comes by: on a GPU the next trainer's shadow needs the room."""
    elsewhere = large_storages()  # pytest keeps what a test that failed had
    tensors = {"w": torch.randn(1_000_003)}
    engine = LocalEngine("a", [DictModel({"w": torch.randn(1_000_003)}, relocatable=False)], mode="staged")
    with Publisher(tensors, [engine], transport=transport, timeout_s=20, shadows=shadows) as publisher:
        for _ in range(3):
            publisher.publish()
        before = large_storages()
    gc.collect()
    gc.disable()
    try:
        engine.stop()
        assert len(before - large_storages()) >= shadows
        assert large_storages() - elsewhere == {
            tensors["w"].data_ptr(),
            *(s.data_ptr() for s in engine.models[0].memory().storages),
        }
    finally:
        gc.enable()


def large_storages() -> set[int]:
    """Where tensors of this process lie that are as large as the test's."""
    found = (each for each in gc.get_objects() if type(each) is torch.Tensor)
    return {each.untyped_storage().data_ptr() for each in found if each.untyped_storage().nbytes() > 4_000_000}


def test_little_room_means_one_copy_and_none_means_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DictModel(fresh(), relocatable=False)
    nbytes = model.memory().nbytes
    monkeypatch.setattr(place, "free_nbytes", lambda device: int(1.5 * nbytes))
    assert place.choose_place(model, (), 2, host=True).copies == 1
    monkeypatch.setattr(place, "free_nbytes", lambda device: nbytes)
    with pytest.raises(ShadowError):
        place.choose_place(model, (), 2, host=True)
    engine = LocalEngine("a", [model])
    tensors = fresh()
    with Publisher(tensors, [engine], timeout_s=20) as publisher:
        assert publisher.publish().mode == "in_place"
        assert model.holds(tensors)


def test_master_weights_are_proven_in_the_published_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.content import expected as proof

    monkeypatch.setattr(proof, "SCRATCH_NBYTES", 4096)
    engine = stuck_engine("a")
    masters = fresh(torch.float32)
    with Publisher(masters, [engine], timeout_s=20, dtype=torch.bfloat16) as publisher:
        for _ in range(2):
            for value in masters.values():
                value.normal_()
            assert publisher.publish().digests_match
            assert engine.models[0].holds(masters)


@st.composite
def placed(draw: st.DrawFn) -> list[Placement]:
    """Placements of any types in two storages, contiguous, permuted or interleaved, which may share bytes."""
    places = []
    for number in range(draw(st.integers(0, 4))):
        sizes = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        strides, step = [0] * len(sizes), draw(st.sampled_from([1, 1, 2]))
        for dim in draw(st.permutations(range(len(sizes)))):
            strides[dim] = step
            step = step * max(sizes[dim], 1) + draw(st.sampled_from([0, 0, 1]))
        region = Region(name=f"t{number}", offsets=(0,) * len(sizes), sizes=sizes)
        place = {"storage": draw(st.integers(0, 1)), "offset": draw(st.integers(0, 9)), "strides": tuple(strides)}
        places.append(Placement(region=region, dtype=draw(st.sampled_from(["uint8", "bfloat16", "float32"])), **place))
    return places


@settings(deadline=None)
@given(placed(), st.sampled_from([1, 4096]))
def test_what_placements_touch_is_exchanged_once_whatever_they_share(places: list[Placement], max_ranges: int) -> None:
    nbytes = max((each.end_nbytes for each in places), default=0) + 4
    sides = [[torch.randint(0, 256, (nbytes,), dtype=torch.uint8) for _ in range(2)] for _ in range(2)]
    live, shadow = (Memory(storages) for storages in sides)
    before = [[storage.clone() for storage in storages] for storages in sides]
    touched = Memory([torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)])
    for each in places:
        view = touched.view(each.storage, each.dtype, each.offset, each.region.sizes, each.strides)
        view.copy_(torch.tensor([255, 255, 255, 255], dtype=torch.uint8).view(view.dtype)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "MAX_RANGES", max_ranges)
        both = exchange.Exchange(live, shadow, places)
    both.run()
    for number, mask in enumerate(touched.storages):
        is_touched = mask != 0
        assert torch.equal(sides[0][number], torch.where(is_touched, before[1][number], before[0][number]))
        assert torch.equal(sides[1][number], torch.where(is_touched, before[0][number], before[1][number]))
    both.run()
    for storages, kept in zip(sides, before, strict=True):
        assert all(torch.equal(storage, old) for storage, old in zip(storages, kept, strict=True))


def test_shadows_is_checked() -> None:
    with pytest.raises(InvalidInput, match="shadows"):
        Publisher(fresh(), [stuck_engine("a")], shadows=3)


GIB = 1 << 30


def machine(folder: Path, groups: str, files: dict[str, str], available: int = 8 * GIB) -> tuple[Path, Path]:
    """A pretended /proc and /sys/fs/cgroup."""
    proc, cgroup = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    return proc, cgroup


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}, 8 * GIB),
        ("0::/\n", {"memory.max": f"{3 * GIB}\n", "memory.current": f"{GIB}\n"}, 2 * GIB),
        (
            "0::/a/b\n",
            {
                "a/memory.max": f"{4 * GIB}", "a/memory.current": f"{3 * GIB}",
                "a/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\nshmem {GIB}\n",
                "a/b/memory.max": f"{7 * GIB}", "a/b/memory.current": "0",
            },
            GIB + GIB // 2 + GIB // 4,
        ),
        ("0::/\n", {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}, 0),
        (
            "5:cpu:/\n4:memory:/of/the/host\n0::/\n",
            {
                "memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}",
                "memory/memory.stat": f"total_inactive_file {GIB // 2}\ntotal_active_file 0\ninactive_file 7\n",
            },
            GIB + GIB // 2,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}", "memory/memory.usage_in_bytes": "1"}, 8 * GIB),
    ],
)  # fmt: skip
def test_room_ends_at_the_nearest_limit(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    proc, cgroup = machine(tmp_path, groups, files)
    assert host_room_nbytes(proc=proc, cgroup=cgroup) == expected


def test_a_system_that_does_not_tell_stages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_room_nbytes(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup") is None
    assert (host_room_nbytes() or 0) > 0
    monkeypatch.setattr(place, "host_room_nbytes", lambda: None)
    with pytest.raises(ShadowError, match="cannot tell"):
        place.free_nbytes(torch.device("cpu"))


class _Machine:
    """A pretended host with so much memory, which all processes see by one file: what they took is appended to it."""

    def __init__(self, path: str, nbytes: int) -> None:
        self._path, self._nbytes = Path(path), nbytes

    def free(self, device: torch.device) -> int:
        left = self._nbytes - sum(map(int, self._path.read_text().split()))
        time.sleep(0.05)  # others look meanwhile
        return left

    def take(self, nbytes: int, *_: object) -> torch.Tensor:
        time.sleep(0.05)
        with self._path.open("a") as file:
            file.write(f"{nbytes}\n")
        return torch.empty(nbytes, dtype=torch.uint8)


def _join(rank: int, size: int, path: str, dies: int) -> str:
    """Make a target on the pretended host, which has room for two and a half; one process is killed while it takes memory."""
    model = DictModel({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    manifest = Manifest.of(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in SHAPES.items())
    host = _Machine(path, int(2.5 * model.memory().nbytes * place.CHECK_HEADROOM))
    place.free_nbytes = host.free  # type: ignore[assignment]

    def take(*args: Any) -> torch.Tensor:
        if rank == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return host.take(*args)

    shadow.new_storage = take
    return make_target(model, manifest, model.layout(manifest), "auto", 1, None, Deadline(60))[0]


def test_workers_of_one_host_share_the_room(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    assert sorted(run_ranks(_join, 4, str(taken), -1)) == ["in_place", "in_place", "staged", "staged"]


def test_a_worker_that_is_killed_while_it_takes_memory_holds_up_nobody(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(RankFailed, match="SIGKILL"):
        run_ranks(_join, 1, str(taken), 0)
    assert sorted(run_ranks(_join, 3, str(taken), -1)) == ["in_place", "staged", "staged"]


def test_a_folder_of_somebody_else_holds_no_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with taking_memory(torch.device("cpu"), Deadline(20)):
        with pytest.raises(DeadlineExceeded, match="other workers"), taking_memory(torch.device("cpu"), Deadline(0.1)):
            pass
        assert taking._folder() is not None
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        monkeypatch.setattr(taking, "Path", lambda path: tmp_path)
        (tmp_path / "weightcast-12345").mkdir()
        assert taking._folder() is None
