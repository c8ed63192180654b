"""A stock engine of another shape than vLLM's: schedulers on threads of their own, whose ranks carry orders out in lockstep."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.scripted_vllm import Failure, ScriptedWorker

from weightcast.commit.order import RoundAnswer, RoundOrder
from weightcast.commit.stock import StockEngine
from weightcast.engines.stock.front import StockControl, StockFront
from weightcast.engines.stock.in_lockstep import update_in_lockstep
from weightcast.engines.stock.refused import Refused, refuse
from weightcast.engines.stock.versions import VersionRange
from weightcast.errors import EngineError, LoadError, StateError, Unsupported

RANGE = VersionRange("Stand-in", (0, 5, 16), (0, 5, 23))


class Replica:
    """The ranks of one replica, each on its scheduler's thread, that exchange records between two steps."""

    def __init__(self, ranks: range) -> None:
        self.workers = [ScriptedWorker(rank=rank) for rank in ranks]
        self.threads = [ThreadPoolExecutor(1, f"scheduler-{rank}") for rank in ranks]
        self.paused = False
        self.cleared = 0
        self.calls: list[str] = []
        self._meeting = threading.Barrier(len(ranks))
        self._records: dict[int, dict[str, Any]] = {}

    async def do(self, action: str, payload: Mapping[str, Any], clear_cache: bool = False) -> list[Any]:
        self.calls.append(action)
        orders = [
            asyncio.wrap_future(thread.submit(self._carry_out, worker, action, payload))
            for worker, thread in zip(self.workers, self.threads, strict=True)
        ]
        answers = await asyncio.gather(*orders)
        assert answers.count(answers[0]) == len(answers) or action != "update", "all ranks know what all came to"
        self.cleared += clear_cache
        return answers[0] if action == "update" else list(answers)

    def _carry_out(self, worker: ScriptedWorker, action: str, payload: Mapping[str, Any]) -> Any:
        if action != "update":
            return worker.call(action, payload)
        return update_in_lockstep(worker.call, payload, lambda record: self._gather(worker.rank, record))

    def _gather(self, rank: int, record: dict[str, Any]) -> list[dict[str, Any]]:
        self._records[rank] = record
        self._meeting.wait(10)
        records = [self._records[worker.rank] for worker in self.workers]
        self._meeting.wait(10)
        return records


class StandIn(StockEngine):
    """``num_replicas`` of two ranks each."""

    product = "Stand-in"

    def __init__(self, num_replicas: int = 1) -> None:
        self.replicas = [Replica(range(2 * number, 2 * number + 2)) for number in range(num_replicas)]
        self.label = "default"
        self.has_backend = True

    @property
    def workers(self) -> list[ScriptedWorker]:
        return [worker for replica in self.replicas for worker in replica.workers]

    @property
    def in_one_step(self) -> bool:
        return len(self.replicas) == 1

    @property
    def model_name(self) -> str:
        return "m"

    def world_size(self, include_dp: bool = True) -> int:
        return 2 * (len(self.replicas) if include_dp else 1)

    def require_backend(self) -> None:
        if not self.has_backend:
            raise StateError("not started with weightcast")

    async def call_workers(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        return [answer for replica in self.replicas for answer in await replica.do(action, payload)]

    async def update(self, info: Mapping[str, Any], clear_cache: bool) -> list[Any]:
        return [answer for replica in self.replicas for answer in await replica.do("update", info, clear_cache)]

    async def is_paused(self) -> bool:
        return any(replica.paused for replica in self.replicas)

    async def pause(self, mode: str, clear_cache: bool) -> None:
        self._all("pause", True)

    async def resume(self) -> None:
        self._all("resume", False)

    async def forget_cache(self) -> None:
        for replica in self.replicas:
            replica.cleared += 1

    async def set_label(self, version: str) -> None:
        self.label = version

    def _all(self, call: str, paused: bool) -> None:
        for replica in self.replicas:
            replica.paused = paused
            replica.calls.append(call)


def control_of(engine: StandIn) -> StockControl[StockFront[StandIn]]:
    control = StockControl(StockFront[StandIn])
    control.attach(engine)
    return control


async def commit(control: StockControl[Any], number: int, **fields: Any) -> RoundAnswer:
    order = {"action": "commit", "epoch": 1, "round": number, "version": f"{number}-x", "timeout_s": 10.0, **fields}
    return await control.carry_out(RoundOrder(**order))


@pytest.mark.parametrize("clear_cache", [True, False])
async def test_ranks_in_lockstep_need_no_pause(clear_cache: bool) -> None:
    engine = StandIn()
    control = control_of(engine)
    for number in (1, 2):
        assert (await commit(control, number, clear_cache=clear_cache)).version == f"{number}-x"
    assert [worker.version for worker in engine.workers] == ["2-x"] * 2
    assert engine.label == "2-x"
    assert engine.replicas[0].calls == ["update", "update"], "no pause, no question, one call a commit"
    assert engine.replicas[0].cleared == (2 if clear_cache else 0)
    await commit(control, 3, pause="wait")
    assert engine.replicas[0].calls[2:] == ["pause", "update", "resume"], "running requests are waited for where asked"


async def test_replicas_are_not_in_lockstep_and_are_paused() -> None:
    engine = StandIn(2)
    control = control_of(engine)
    assert (await commit(control, 1)).version == "1-x"
    assert [replica.calls for replica in engine.replicas] == [["pause", "update", "resume"]] * 2


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_where_one_rank_fails_all_others_are_taken_back(num_replicas: int) -> None:
    engine = StandIn(num_replicas)
    control = control_of(engine)
    await commit(control, 1)
    engine.workers[1].fails["commit"] = Failure()
    with pytest.raises(LoadError) as caught:
        await commit(control, 2)
    assert caught.value.worker == 1
    assert [worker.version for worker in engine.workers] == ["1-x"] * 2 * num_replicas
    assert (engine.label, await engine.is_paused()) == ("1-x", False)
    assert engine.workers[0].num_updates >= 3, "the rank that had carried it out went back"
    assert (await commit(control, 3)).version == "3-x"


async def test_ranks_without_a_version_are_held_until_an_update_succeeds() -> None:
    engine = StandIn()
    control = control_of(engine)
    for worker in engine.workers:
        worker.fails["commit"] = Failure(dirty=True)
    with pytest.raises(LoadError):
        await commit(control, 1)
    assert await engine.is_paused()
    assert (await control.status()).reason.startswith("the weights of worker 0, 1 are of no version")
    await commit(control, 2)
    assert not await engine.is_paused()
    assert not any(worker.held for worker in engine.workers)


async def test_what_cannot_be_asked_is_refused_and_no_worker_is_touched() -> None:
    engine = StandIn()
    control = control_of(engine)
    with pytest.raises(Unsupported, match="this Stand-in cannot sleep"):
        await control.wake([])
    engine.has_backend = False
    for call in (commit(control, 1), control.status(), control.shutdown()):
        with pytest.raises(StateError, match="not started"):
            await call
    assert not engine.replicas[0].calls
    with pytest.raises(EngineError, match="not up yet"):
        _ = StockControl(StockFront[StandIn]).front


def test_versions_and_settings_are_refused_by_name() -> None:
    for version in ("0.5.15", "0.5.24", "0.6.0", "1.0.0"):
        with pytest.raises(Unsupported, match=rf"Stand-in {version} .*0\.5\.16 to 0\.5\.23"):
            RANGE.check(version)
    assert RANGE.check("0.5.16") == (0, 5, 16)
    assert RANGE.check("0.5.23.post1") == (0, 5, 23)
    assert RANGE.check("dev") == RANGE.last

    class Arguments:
        lora = None
        offload = 2

    harmless = Refused("lora", None, "LoRA is", "Serve merged weights")
    refuse(Arguments, [harmless], RANGE)
    with pytest.raises(Unsupported, match=r"offload is not supported.*\(offload\)"):
        refuse(Arguments, [harmless, Refused("offload", 0, "offload is", "Set it to 0")], RANGE)
    with pytest.raises(Unsupported, match="this Stand-in has no setting colour"):
        refuse(Arguments, [Refused("colour", 0, "colour is", "")], RANGE)
