"""The client of vLLM's development routes, against a server that speaks them for a scripted engine."""

from collections.abc import Iterator

import pytest
from tests.support.dev_server import DevServer
from tests.support.scripted_vllm import Failure, ScriptedVllm

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, LoadError
from weightcast.trainer.clients import CommitOrder, VllmDevClient

SOON = 5.0


@pytest.fixture
def server() -> Iterator[DevServer]:
    running = DevServer(ScriptedVllm(2))
    yield running
    running.close()


def commit(client: VllmDevClient, number: int, timeout_s: float = SOON) -> None:
    client.commit(CommitOrder(epoch=1, round=number, version=f"{number}-x"), Deadline(timeout_s))


def test_a_round_without_a_time_limit_of_vllms(server: DevServer) -> None:
    client = VllmDevClient(server.url)
    client.init({}, Deadline(SOON))
    commit(client, 1)
    engine = server.engine
    assert (engine.versions, engine.label, engine.paused) == (["1-x", "1-x"], "1-x", False)
    assert all("timeout" not in body for body in server.bodies)
    assert "pause keep clear=True" in engine.calls


@pytest.mark.parametrize("step", ["pause", "commit", "resume"])
def test_an_overrun_freezes_nothing(server: DevServer, step: str) -> None:
    client = VllmDevClient(server.url)
    commit(client, 1)
    engine = server.engine
    engine.seconds[step] = 0.8
    with pytest.raises(DeadlineExceeded):
        commit(client, 2, 0.3)
    engine.seconds.clear()
    client.rollback(1, 2, Deadline(SOON))
    assert (engine.versions, engine.paused) == (["1-x", "1-x"], False)


def test_a_dirty_server_is_healed_by_another_trainer(server: DevServer) -> None:
    engine = server.engine
    engine.workers[1].fails["commit"] = Failure(dirty=True)
    with pytest.raises(LoadError):
        commit(VllmDevClient(server.url), 1)
    assert engine.paused
    commit(VllmDevClient(server.url), 2)
    assert (engine.versions, engine.paused) == (["2-x", "2-x"], False)


def test_a_scheduler_goes_on_when_nothing_sleeps_any_more(server: DevServer) -> None:
    """Healed by a round while keys and values sleep: resuming the scheduler would have it compute with memory that is not mapped."""
    client = VllmDevClient(server.url)
    server.engine.workers[0].fails["commit"] = Failure(dirty=True)
    with pytest.raises(LoadError):
        commit(client, 1)
    assert server.engine.paused
    server.engine.fall_asleep()
    assert client.wake(("weights",), Deadline(SOON)) == ("kv_cache",)
    server.engine.calls.clear()
    commit(client, 2)
    assert server.engine.versions == ["2-x"] * 2
    assert server.engine.paused
    assert "resume" not in server.engine.calls
    assert client.wake((), Deadline(SOON)) == ()
    assert not server.engine.paused


def test_a_cache_that_the_server_keeps_fails_the_round(server: DevServer) -> None:
    server.engine.keeps_cache = True
    with pytest.raises(EngineError, match="Failed to reset"):
        commit(VllmDevClient(server.url), 1)
    assert not server.engine.paused
