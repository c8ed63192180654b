"""vLLM's own weight routes, which say what a worker refused, and an engine core that is killed in a commit, of one served vLLM."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.vllm.stock import DEV_MODE

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, PeerLost, RoundFailed
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

TIMEOUT_S = 600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("killed") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with vllm_server(model, env=DEV_MODE) as running:
        yield running


def core_of(server: Served) -> int:
    """The process id of the engine's core, a child of the server."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = path.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if "EngineCor" in name and int(rest.split()[1]) == server.pid:
            return int(path.parent.name)
    raise AssertionError("no core was found")


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Killing(HttpEngineClient):
    """Kills the core a moment after the commit was ordered; until then the core stands still, so that the commit does not end."""

    core = 0

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.core:
            os.kill(self.core, signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (self.core, signal.SIGKILL)).start()
        return super().commit(order, deadline)


def test_vllms_own_routes_say_what_a_worker_refused(served: Served, model: Path) -> None:
    answer = served.post(
        "/init_weight_transfer_engine", {"init_info": {"address": "tcp://127.0.0.1:1", "colour": "red"}}
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "InvalidInput"), answer.text
    answer = served.post("/start_weight_update", {})
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "StateError"), answer.text
    # No update is open in vLLM's worker after the refusal, and the worker itself says so.
    answer = served.post("/update_weights", {"update_info": {"epoch": 1, "round": 1}})
    assert answer.status_code == 424, answer.text
    assert "start_weight_update must be called" in answer.text
    answer = served.post("/finish_weight_update", {})
    assert answer.status_code in (409, 424), answer.text
    assert served.version == "default"
    assert served.get("/ready").json() == {"status": "ready", "weight_version": "default"}
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], token=served.token, timeout_s=60) as publisher:
        assert publisher.publish().digests_match


def test_a_core_that_dies_in_a_commit_ends_the_round_and_the_server(served: Served, model: Path) -> None:
    """The last test here: it leaves no server."""
    client = Killing(served.url, token=served.token)
    weights = random_state_dict(model)
    with Publisher(weights, [client], timeout_s=TIMEOUT_S) as publisher:
        assert publisher.publish().digests_match
        client.core = core_of(served)
        weights.update(random_state_dict(model))
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        (cause,) = caught.value.causes.values()
        assert isinstance(cause, PeerLost | EngineError), cause
        assert "Restart" in str(cause)
        assert eventually(lambda: has_ended(served.pid), 60), "a supervisor can restart it"
