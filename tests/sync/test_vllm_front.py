"""The control of a vLLM server: workers that fail, engines that are held because of their weights, and who lets them go on."""

import asyncio
from typing import Any

import pytest
from tests.support.scripted_vllm import ERAS, Failure, ScriptedVllm

from weightcast.deadline import Deadline
from weightcast.engines.vllm.front import VllmControl
from weightcast.errors import DeadlineExceeded, EngineError, LoadError, StateError, Unsupported, WeightcastError
from weightcast.server.control import RoundAnswer, RoundOrder

DIRTY = Failure(dirty=True)


def control_of(client: ScriptedVllm) -> VllmControl:
    control = VllmControl()
    control.attach(client)
    return control


async def commit(control: VllmControl, number: int, **fields: Any) -> RoundAnswer:
    order = {"action": "commit", "epoch": 1, "round": number, "version": f"{number}-x", "timeout_s": 5.0, **fields}
    return await control.carry_out(RoundOrder(**order))


@pytest.mark.parametrize("era", ERAS)
async def test_a_round_in_every_worker_of_every_replica(era: str) -> None:
    client = ScriptedVllm(2, 2, era=era)
    control = control_of(client)
    answer = await commit(control, 1)
    assert answer.version == "1-x"
    assert client.versions == ["1-x"] * 4
    assert client.label == ("default" if era == "0.26" else "1-x")
    assert not client.paused
    status = await control.status()
    assert status.weight_version == "1-x"
    unknown = ("num_waiting", "num_kv_tokens", "num_generated_tokens", "num_preemptions")
    assert {name: getattr(status, name) for name in unknown} == dict.fromkeys(unknown), "not known is not zero"


async def test_an_answer_of_some_workers_only_is_refused() -> None:
    client = ScriptedVllm(2, 1)
    client.vllm_config.parallel_config.world_size_across_dp = 4
    with pytest.raises(Unsupported, match="2 of 4 workers answered"):
        await control_of(client).front.init_weight_transfer_engine({})


async def test_where_one_of_two_workers_fails_the_other_is_taken_back() -> None:
    client = ScriptedVllm(2)
    control = control_of(client)
    await commit(control, 1)
    client.workers[1].fails["commit"] = Failure()
    with pytest.raises(LoadError):
        await commit(control, 2)
    assert client.versions == ["1-x", "1-x"]
    assert client.label == "1-x"
    assert not client.paused
    status = await control.status()
    assert (status.weight_version, status.ready, status.paused) == ("1-x", True, False)


@pytest.mark.parametrize("pause", ["keep", "none"])
@pytest.mark.parametrize("heal_pause", ["keep", "none"])
async def test_a_dirty_engine_is_held_until_an_update_succeeds(pause: str, heal_pause: str) -> None:
    client = ScriptedVllm()
    control = control_of(client)
    client.workers[0].fails["commit"] = DIRTY
    with pytest.raises(LoadError):
        await commit(control, 1, pause=pause)
    status = await control.status()
    assert (client.paused, status.dirty, status.ready, status.paused) == (True, True, False, True)
    await control.carry_out(RoundOrder(action="rollback", epoch=1, round=1))
    assert client.paused, "a roll-back that has nothing to take back heals nothing"
    await commit(control, 2, pause=heal_pause)
    status = await control.status()
    assert (client.paused, status.dirty, status.ready, status.paused) == (False, False, True, False)
    assert not any(worker.held for worker in client.workers)


async def test_another_process_of_the_server_lets_a_healed_engine_go_on() -> None:
    client = ScriptedVllm()
    first, second = control_of(client), control_of(client)
    client.workers[0].fails["commit"] = DIRTY
    with pytest.raises(LoadError):
        await commit(first, 1)
    await commit(second, 2)
    assert not client.paused
    await commit(first, 3)
    assert (client.paused, client.label) == (False, "3-x")


async def test_workers_of_two_versions_are_held_until_an_update_succeeds() -> None:
    client = ScriptedVllm(2, in_place=True)
    control = control_of(client)
    client.workers[1].fails["commit"] = Failure(kind="DeadlineExceeded")
    with pytest.raises(DeadlineExceeded):
        await commit(control, 1)
    assert client.versions == ["1-x", "default"]
    assert client.paused
    assert client.label == "default"
    status = await control.status()
    assert (status.dirty, status.ready) == (True, False)
    assert "worker 0 serves 1-x, worker 1 serves default" in status.reason
    await commit(control, 2)
    assert client.versions == ["2-x", "2-x"]
    assert not client.paused


@pytest.mark.parametrize("fails", [False, True])
async def test_a_pause_of_somebody_else_stays_as_it_was(fails: bool) -> None:
    client = ScriptedVllm()
    control = control_of(client)
    await client.pause_generation(mode="keep")
    if fails:
        client.workers[0].fails["commit"] = DIRTY
        with pytest.raises(LoadError):
            await commit(control, 1)
    await commit(control, 2)
    assert client.paused
    assert [call for call in client.calls if call.startswith("pause keep clear=True")], "its caches are forgotten"


async def test_a_pause_that_takes_too_long_is_undone() -> None:
    client = ScriptedVllm()
    control = control_of(client)
    client.seconds["pause"] = 0.4
    with pytest.raises(DeadlineExceeded):
        await commit(control, 1, pause="wait", timeout_s=0.1)
    await control.front.get_weight_version()
    while client.paused:
        await control.front.get_weight_version()
    client.seconds.clear()
    await commit(control, 2)
    assert not client.paused


async def test_an_engine_that_does_not_say_whether_it_is_paused_keeps_nobody_waiting() -> None:
    client = ScriptedVllm()
    control = control_of(client)
    client.seconds["is_scheduler_paused"] = 3600
    first = RoundOrder(action="commit", epoch=1, round=1, version="1-x", timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        await control.carry_out(first)
    while (await control.details(with_checksums=False))["committing"]:
        await asyncio.sleep(0.01)
    assert client.versions == ["default"]


async def test_a_cache_that_vllm_keeps_fails_the_round() -> None:
    client = ScriptedVllm()
    client.keeps_cache = True
    with pytest.raises(EngineError, match="Failed to reset"):
        await commit(control_of(client), 1, pause="none")


async def test_labels_that_differ_are_set_again() -> None:
    client = ScriptedVllm(1, 2)
    control = control_of(client)

    async def disagree() -> str:
        raise RuntimeError("Engines returned different get_weight_version results")

    client.get_weight_version = disagree  # type: ignore[attr-defined]
    await commit(control, 1)
    assert client.label == "1-x"


async def test_an_update_of_vllms_own_routes_is_named_only_when_every_worker_carried_it_out() -> None:
    client = ScriptedVllm(2)
    front = control_of(client).front
    client.workers[1].error = "LoadError"
    with pytest.raises(LoadError):
        await front.close_update("7-y")
    assert client.label == "default"
    client.workers[1].error = ""
    await front.close_update("7-y")
    assert (client.label, client.calls.count("finish")) == ("7-y", 1)


async def test_an_engine_of_another_backend_is_not_asked() -> None:
    client = ScriptedVllm()
    client.vllm_config.weight_transfer_config.backend = "nccl"
    control = control_of(client)
    with pytest.raises(StateError, match="weight-transfer-config"):
        await control.status()
    assert client.calls == []
    with pytest.raises(StateError, match="weight-transfer-config"):
        await control.front.close_update("5-z")
    assert client.label == "default"


async def test_an_unknown_object_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"Deadline.*0\.26"):
        VllmControl().attach(Deadline(1))
    with pytest.raises(WeightcastError, match="not up yet"):
        _ = VllmControl().front


@pytest.mark.parametrize("call", ["commit", "init", "status", "digests"])
async def test_a_call_ends_when_the_engine_dies(call: str) -> None:
    """vLLM leaves such a call unanswered, and its server waits for the connection before it ends."""
    client = ScriptedVllm()
    control = control_of(client)
    calls = {
        "commit": lambda: commit(control, 1, timeout_s=600.0),
        "init": lambda: control.front.init_weight_transfer_engine({}),
        "status": control.status,
        "digests": lambda: control.front.checksums(),
    }
    client.seconds = dict.fromkeys(("commit", "init", "status", "checksums"), 3600)
    running = asyncio.ensure_future(calls[call]())
    await asyncio.sleep(0.1)
    client.die()
    for attempt in (running, calls[call]()):
        with pytest.raises(EngineError) as caught:
            await attempt
        assert caught.value.hint == "Restart the engine, then publish again"


async def test_updates_are_counted_by_the_workers_not_by_one_process_of_the_server() -> None:
    client = ScriptedVllm(2)
    controls = [control_of(client), control_of(client)]
    for number in range(1, 6):
        await commit(controls[number % 2], number)
    assert [(await control.status()).num_syncs for control in controls] == [5, 5]
