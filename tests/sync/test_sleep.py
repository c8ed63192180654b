"""Engines that sleep: whatever would touch weights that are not mapped is refused, and what lies beside them goes with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.scripted_vllm import Failure, ScriptedLLM, ScriptedVllm
from tests.support.sleepy import SleepingModel

from weightcast import Publisher
from weightcast.commit.order import RoundOrder
from weightcast.commit.worker_outcome import NO_VERSION
from weightcast.engines.vllm.front import VllmControl
from weightcast.errors import LoadError, RoundFailed, StateError
from weightcast.receiver.receiver import WAKE_HINT
from weightcast.testing.local_engine import LocalEngine
from weightcast.trainer.clients.vllm import VllmClient


def fresh() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(33, 7), "b": torch.randn(300).to(torch.bfloat16), "c": torch.randn(5)}


def sleep(engine: LocalEngine, level: int) -> None:
    """As a worker of vLLM is told, and then the memory is gone; of level 2 it comes back as anything."""
    for worker, model in zip(engine.workers, engine.models, strict=True):
        worker.sleep(loses=level >= 2)
        if level >= 2:
            for tensor in model.parameters().values():
                tensor.copy_(torch.randn(tensor.shape))
        model.unmapped = True  # type: ignore[attr-defined]


def wake(engine: LocalEngine) -> None:
    for model in engine.models:
        model.unmapped = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("through", [(), ("b",)], ids=["direct", "loader"])
def test_a_round_into_an_engine_that_sleeps_is_refused_and_the_next_one_works(
    level: int, mode: str, through: tuple[str, ...]
) -> None:
    weights = fresh()
    models = [SleepingModel(weights, relocatable=False, through_loader=through) for _ in range(2)]
    engine = LocalEngine("llm", models, mode=mode)
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        for _ in range(2):
            version = publisher.publish().version
            before = {name: tensor.clone() for name, tensor in weights.items()}
            sleep(engine, level)
            assert not any(worker.receiver.has_session for worker in engine.workers), (
                "all that lay beside is given back"
            )
            for tensor in weights.values():
                tensor.copy_(torch.randn(tensor.shape))
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
            cause = caught.value.causes["llm"]
            assert isinstance(cause, StateError)
            assert "asleep" in str(cause)
            assert cause.hint == WAKE_HINT
            wake(engine)
            served = {(worker.weight_version, worker.dirty) for worker in engine.workers}
            assert served == ({(version, False)} if level == 1 else {(NO_VERSION, True)})
            if level == 1:
                assert all(model.holds(before) for model in models)
            report = publisher.publish()
            assert report.digests_match
            assert {(w.weight_version, w.dirty) for w in engine.workers} == {(report.version, False)}
            assert all(model.holds(weights) for model in models)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_an_engine_that_falls_asleep_without_a_word_is_refused_in_every_call(mode: str) -> None:
    """Nobody told the worker: it asks itself before it touches anything."""
    weights = fresh()
    model = SleepingModel(weights, relocatable=False)
    engine = LocalEngine("llm", [model], mode=mode)
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        version = publisher.publish().version
        before = {name: tensor.clone() for name, tensor in weights.items()}
        for tensor in weights.values():
            tensor.copy_(torch.randn(tensor.shape))
        model.unmapped = True
        with pytest.raises(RoundFailed, match="asleep") as caught:
            publisher.publish()
        assert caught.value.dirty == ()
        model.unmapped = False
        assert engine.workers[0].weight_version == version
        assert model.holds(before)
        publisher.publish()
        assert model.holds(weights)


def test_a_way_back_to_what_was_lost_is_no_version() -> None:
    """The first round after a level-2 sleep fails elsewhere: what it is taken back to is served by nobody."""
    weights = fresh()
    slept = LocalEngine("slept", [SleepingModel(weights, relocatable=False)], mode="staged")
    other = LocalEngine("other", [SleepingModel(weights, relocatable=False)], mode="staged")
    with Publisher(weights, [slept, other], timeout_s=20) as publisher:
        publisher.publish()
        sleep(slept, 2)
        wake(slept)
        other.refuse("commit")
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert "slept" in caught.value.dirty
        assert (slept.workers[0].weight_version, slept.workers[0].dirty) == (NO_VERSION, True)
        other.refuse()
        report = publisher.publish()
        assert (slept.workers[0].weight_version, slept.workers[0].dirty) == (report.version, False)


def scripted(num_workers: int = 2) -> tuple[ScriptedVllm, VllmControl]:
    client, control = ScriptedVllm(num_workers), VllmControl()
    client.vllm_config.model_config.enable_sleep_mode = True
    control.attach(client)
    return client, control


def order(number: int) -> RoundOrder:
    return RoundOrder(action="commit", epoch=1, round=number, version=f"{number}-x", timeout_s=5.0)


async def test_a_servers_commit_asks_first_whether_weights_are_mapped() -> None:
    client, control = scripted()
    await control.carry_out(order(1))
    client.workers[1].asleep = ("kv_cache", "weights")
    client.calls.clear()
    with pytest.raises(StateError, match="worker 1 are not mapped") as caught:
        await control.carry_out(order(2))
    assert caught.value.hint
    assert client.calls == [], "nothing was paused, nothing was asked for"
    assert client.versions == ["1-x", "1-x"]
    client.workers[1].asleep = ()
    await control.carry_out(order(3))
    assert client.versions == ["3-x", "3-x"]


async def test_a_scheduler_goes_on_when_nothing_sleeps_any_more() -> None:
    """Weights are awake, keys and values are not: the pause of the sleep stays, one of our own as well."""
    client, control = scripted()
    client.workers[0].fails["commit"] = Failure(dirty=True)
    with pytest.raises(LoadError):
        await control.carry_out(order(1))
    assert client.paused
    for worker in client.workers:
        worker.asleep = ("kv_cache",)
    client.calls.clear()
    await control.carry_out(order(2))
    assert client.versions == ["2-x", "2-x"]
    assert client.paused
    assert "resume" not in client.calls
    assert not any(worker.held for worker in client.workers)


async def test_weights_that_were_lost_are_named_in_the_status() -> None:
    client, control = scripted(1)
    client.workers[0].version, client.workers[0].dirty = NO_VERSION, True
    status = await control.status()
    assert (status.weight_version, status.ready) == (NO_VERSION, False)
    assert "lost in its sleep" in status.reason


def test_an_llm_object_is_asked_first_as_well() -> None:
    llm = ScriptedLLM()
    llm.llm_engine.vllm_config.model_config = SimpleNamespace(model="scripted", enable_sleep_mode=True)
    client = VllmClient(llm)
    llm.workers[0].asleep = ("weights",)
    with pytest.raises(StateError, match="are not mapped"):
        client._committer_of().carry_out(order(1), _deadline())
    assert llm.workers[0].num_updates == 0
    llm.workers[0].asleep = ("kv_cache",)
    client._committer_of().carry_out(order(2), _deadline())
    assert llm.workers[0].version == "2-x"
    client.close()


def _deadline() -> Any:
    from weightcast.deadline import Deadline

    return Deadline(5.0)
