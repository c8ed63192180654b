"""publish(wake=True): one call for a trainer and engines that share GPUs, whatever fails on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.sleepy import SleepyEngine
from torch import nn

from weightcast import Publisher
from weightcast.control.coordinator import Coordinator
from weightcast.errors import InvalidInput, RoundFailed, Unsupported, WakeFailed
from weightcast.messages import Begin
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

ORDER = ["wake weights", "commit", "leave", "release", "wake all"]


def fresh() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(34, 7), "b": torch.randn(300).to(torch.bfloat16), "c": torch.randn(6)}


def refill(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.copy_(torch.randn(tensor.shape))


def releasing(*engines: SleepyEngine) -> Callable[[], None]:
    """Frees nothing, and looks: engines hold nothing of the trainer's, and keys and values sleep on."""

    def release() -> None:
        for engine in engines:
            engine.said.append("release")
            assert not any(worker.receiver.has_session for worker in engine.workers)
            assert "weights" not in engine.asleep
            assert not engine.computes

    return release


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("mode", ["auto", "staged"])
@pytest.mark.parametrize("level", [1, 2])
def test_one_call_does_it_all_in_order(level: int, mode: str, num_workers: int) -> None:
    weights = fresh()
    engine = SleepyEngine("llm", weights, mode=mode, num_workers=num_workers)
    modes: set[str] = set()

    def look(phase: str) -> None:
        if phase == "commit":
            assert not engine.computes
            modes.update(worker.receiver._session.mode for worker in engine.workers if worker.receiver._session)

    engine.before = look
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        versions = set()
        for _ in range(3):
            engine.fall_asleep(level)
            engine.said.clear()
            refill(weights)
            report = publisher.publish(wake=True, release=releasing(engine))
            assert report.digests_match
            assert engine.said == ORDER
            assert engine.computes
            assert all(model.holds(weights) for model in engine.models)
            assert {(worker.weight_version, worker.dirty) for worker in engine.workers} == {(report.version, False)}
            versions.add(report.version)
        engine.refuse()
        assert len(versions) == 3
        assert modes == {"in_place" if mode == "auto" else mode}, "what sleeps will want its memory back"
        engine.said.clear()
        refill(weights)
        publisher.publish(wake=True)
        assert engine.said == ["wake weights", "commit"], "nothing slept, and nothing was to be released"
        refill(weights)
        publisher.publish()
        assert all(model.holds(weights) for model in engine.models)


def test_trls_colocated_sequence() -> None:
    """Asleep at level 2 from the start; weights wake, are published in place, and keys and values wake for the next generation."""
    weights = fresh()
    engine = SleepyEngine("llm", fresh())
    engine.fall_asleep(2)
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        for _ in range(3):
            refill(weights)
            engine.wake(["weights"], SimpleNamespace())  # type: ignore[arg-type]
            report = publisher.publish()
            assert not engine.computes, "keys and values sleep on"
            engine.wake(["kv_cache"], SimpleNamespace())  # type: ignore[arg-type]
            assert engine.computes
            assert engine.models[0].holds(weights)
            assert engine.workers[0].weight_version == report.version
            engine.fall_asleep(2)


def test_a_module_may_go_and_come_back_elsewhere() -> None:
    """Nothing refers to a parameter's memory while release runs, so that it can really be freed."""
    module = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7))
    live = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    engine = SleepyEngine("llm", live)
    kept: list[torch.Tensor] = []

    def offload() -> None:
        for parameter in module.parameters():
            kept.append(parameter.data.clone())
            storage = parameter.untyped_storage()
            parameter.data = torch.empty(0)
            assert torch._C._storage_Use_Count(storage._cdata) == 1, "nobody else holds it"

    with Publisher(module, [engine], timeout_s=20) as publisher:
        for _ in range(3):
            engine.fall_asleep(2)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            published = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            publisher.publish(wake=True, release=offload)
            assert engine.models[0].holds(published)
            for parameter in module.parameters():
                parameter.data = kept.pop(0)
        publisher.publish()
        assert engine.models[0].holds(published)


def refuse_once(engine: SleepyEngine, phase: str) -> None:
    def before(asked: str) -> None:
        if asked == phase:
            engine.refuse()
            raise WEIRD

    engine.before = before


WEIRD = RuntimeError("something is odd today")


@pytest.mark.parametrize("phase", ["wake weights", "commit", "leave", "release", "wake all"])
@pytest.mark.parametrize("level", [1, 2])
def test_whatever_fails_what_is_awake_is_named_and_the_next_call_works(phase: str, level: int) -> None:
    weights = fresh()
    engine = SleepyEngine("llm", weights)
    released: list[bool] = []

    def release() -> None:
        released.append(True)
        engine.before("release")

    with Publisher(weights, [engine], timeout_s=20) as publisher:
        version = publisher.publish().version
        for _ in range(2):
            engine.fall_asleep(level)
            refill(weights)
            if phase == "release":
                refuse_once(engine, phase)
            else:
                engine.refuse(phase)
            before = engine.asleep.copy()
            released.clear()
            with pytest.raises((RoundFailed, WakeFailed)) as caught:
                publisher.publish(wake=True, release=release)
            engine.refuse()
            error: Any = caught.value
            assert not engine.computes
            assert "kv_cache" in engine.asleep
            if phase == "wake weights":
                assert engine.asleep == before
                assert (isinstance(error, RoundFailed), error.asleep, released) == (True, {}, [])
            else:
                assert engine.asleep == {"kv_cache"}
                assert error.asleep == {"llm": ("kv_cache",)}
                assert "kv_cache asleep, weights awake" in str(error)
                assert isinstance(error, RoundFailed if phase == "commit" else WakeFailed)
                assert bool(released) == (phase in ("release", "wake all"))
            if isinstance(error, WakeFailed):
                assert error.version in str(error)
                assert (error.version != version, engine.workers[0].weight_version) == (True, error.version)
                assert engine.models[0].holds(weights)
            version = publisher.publish(wake=True, release=release).version
            assert engine.computes
            assert engine.models[0].holds(weights)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("level", [1, 2])
def test_a_goodbye_that_is_heard_too_late_costs_another_round(
    mode: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine slept and woke up, and the trainer's round begins before the trainer hears of it."""
    late: list[Callable[[], None]] = []
    lose, send = Coordinator._lose, Coordinator.send

    def lose_late(self: Coordinator, member: Any, reason: str, **about: Any) -> None:
        late.append(lambda: lose(self, member, reason, **about))

    def send_first(self: Coordinator, member: Any, message: Any) -> None:
        send(self, member, message)
        while late and isinstance(message, Begin):
            late.pop()()

    monkeypatch.setattr(Coordinator, "_lose", lose_late)
    monkeypatch.setattr(Coordinator, "send", send_first)
    monkeypatch.setattr(Coordinator, "probe", lambda self, members: None)
    monkeypatch.setattr(Coordinator, "_unsent", lambda self, parts: None)
    weights = fresh()
    first, second = SleepyEngine("first", weights, mode=mode), SleepyEngine("second", weights, mode=mode)
    with Publisher(weights, [first, second], timeout_s=20) as publisher:
        numbers = [publisher.publish().round]
        for _ in range(3):
            first.fall_asleep(level)
            while not late:  # it travels
                time.sleep(0.001)
            first.wake([], SimpleNamespace()) if level == 1 else first.wake(["weights"], SimpleNamespace())  # type: ignore[arg-type]
            refill(weights)
            report = publisher.publish()
            numbers.append(report.round)
            for engine in (first, second):
                assert engine.models[0].holds(weights)
                assert (engine.workers[0].weight_version, engine.workers[0].dirty) == (report.version, False)
            first.wake([], SimpleNamespace())  # type: ignore[arg-type]
        assert numbers == [1, 3, 5, 7]


def test_an_engine_without_the_new_version_sleeps_on() -> None:
    weights = fresh()
    first, second = (SleepyEngine(name, weights) for name in ("first", "second"))
    with Publisher(weights, [first, second], timeout_s=20, require="live") as publisher:
        publisher.publish()
        for engine in (first, second):
            engine.fall_asleep(2)
        refill(weights)
        second.refuse("commit")
        report = publisher.publish(wake=True, release=releasing(first, second))
        assert not report.ok
        assert first.computes
        assert first.models[0].holds(weights)
        assert (second.computes, second.asleep) == (False, {"kv_cache"})
        second.refuse()
        first.fall_asleep(2)
        refill(weights)
        assert publisher.publish(wake=True).ok
        assert first.computes
        assert second.computes
        assert all(engine.models[0].holds(weights) for engine in (first, second))


def test_an_engine_that_cannot_sleep_is_named() -> None:
    weights = fresh()
    engine, other = SleepyEngine("sleepy", weights), LocalEngine("restless", [DictModel(weights)])
    with Publisher(weights, [engine, other], timeout_s=20) as publisher:
        version = publisher.publish().version
        with pytest.raises(Unsupported, match=r"cannot sleep.*restless"):
            publisher.publish(wake=True)
        assert other.workers[0].weight_version == version
        with pytest.raises(InvalidInput, match="release"):
            publisher.publish(release=lambda: None)
        with pytest.raises(InvalidInput, match="release"):
            publisher.publish(wake=True, release=3)  # type: ignore[arg-type]
        publisher.publish()


def _verls_rank(rank: int, size: int, folder: str) -> None:
    """verl: weights wake, are received, the trainer's parameters go to the host, all ranks meet, keys and values wake."""
    marks = Path(folder)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    weights = fresh()
    for tensor in weights.values():
        dist.broadcast(tensor, 0)
    engine = SleepyEngine("llm", weights) if rank == 0 else None
    number = 0

    def release() -> None:
        weights.update({name: tensor.clone() for name, tensor in weights.items()})
        (marks / f"{number}-{rank}").touch()
        if number == 2 and rank == 1:
            raise RuntimeError("no room on the host")

    def before(phase: str) -> None:
        if phase == "wake all":
            assert all((marks / f"{number}-{other}").exists() for other in range(2)), "not all ranks have released"

    engines = [engine] if engine is not None else []
    with Publisher(weights, engines, timeout_s=30, process_group=dist.group.WORLD) as publisher:
        for number in range(4):
            for tensor in weights.values():
                tensor.copy_(torch.randn(tensor.shape))
                dist.broadcast(tensor, 0)
            if engine is not None:
                engine.before = before
                engine.fall_asleep(2)
            if number == 2:
                with pytest.raises(WakeFailed, match="no room on the host") as caught:
                    publisher.publish(wake=True, release=release)
                assert caught.value.asleep == {"llm": ("kv_cache",)}
                assert caught.value.version.startswith("3-")
            else:
                assert publisher.publish(wake=True, release=release).digests_match
            if engine is not None:
                assert engine.computes == (number != 2)
                assert engine.models[0].holds(weights)
    dist.destroy_process_group()


def test_verls_sequence_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(_verls_rank, 2, str(tmp_path))
