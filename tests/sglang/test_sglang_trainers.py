"""Trainers that die, that are replaced, and that publish to engines of several kinds at once."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.sglang.reference import PROMPTS, Reference, replace
from tests.sglang.servers import Launcher, Server
from tests.support.embedded_server import embedded_server
from tests.vllm.doomed_trainer import MOMENTS

from weightcast import Publisher
from weightcast.errors import StateError, WeightcastError
from weightcast.testing.models import build_tiny_model, random_state_dict

KEY = "sglangs-own-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("trainers") / "m", "llama", dtype="float32")


@pytest.fixture(scope="module")
def server(launcher: Launcher, model: Path) -> Iterator[Server]:
    """Messages go by msgpack between its processes; servers of the other tests have SGLang's own choice."""
    with launcher.server(model, env={"SGLANG_USE_PICKLE_IPC": "0"}) as running:
        yield running


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_trainer_leaves_version_n_and_another_can_publish(
    launcher: Launcher, server: Server, model: Path, moment: str
) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
        version = publisher.publish().version
    before = Reference(model, weights).answers()
    doomed = launcher.run(
        "tests.vllm.doomed_trainer:main", str(model), server.url, server.token, moment, log=model.parent / "doomed.log"
    )
    assert launcher.wait(doomed) == -signal.SIGKILL
    assert (server.answers(PROMPTS), server.version) == (before, version)
    replace(weights, model)
    with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
        end = time.monotonic() + 30
        while True:
            try:
                report = publisher.publish()
                break
            except WeightcastError:
                assert time.monotonic() < end
                time.sleep(0.5)
    assert server.version == report.version
    assert server.answers(PROMPTS) == Reference(model, weights).answers()


def test_a_trainer_is_replaced_only_when_it_is_told(server: Server, model: Path) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [server.url], token=server.token, timeout_s=30) as first:
        first.publish()
        with (
            Publisher(weights, [server.url], token=server.token, timeout_s=30) as other,
            pytest.raises(StateError, match="another trainer"),
        ):
            other.publish()
        replace(weights, model)
        with Publisher(weights, [server.url], token=server.token, timeout_s=30, takeover=True) as successor:
            report = successor.publish()
            assert server.version == report.version
            assert server.answers(PROMPTS) == Reference(model, weights).answers()
            with pytest.raises(WeightcastError):
                first.publish(timeout_s=5)
            assert server.version == report.version


def test_one_publisher_drives_sglang_and_an_embedded_server(server: Server, model: Path) -> None:
    weights = random_state_dict(model)
    with (
        embedded_server(model, server.token) as (embedded, _),
        Publisher(weights, [server.url, embedded.url], token=server.token, timeout_s=60) as publisher,
    ):
        for _ in range(2):
            replace(weights, model)
            report = publisher.publish()
            assert report.digests_match
            assert {engine.version for engine in report.engines} == {report.version}
            fresh = Reference(model, weights).answers()
            assert server.answers(PROMPTS) == fresh
            assert [ids for ids, _ in embedded.answers(PROMPTS)] == fresh


def test_weightcasts_token_is_beside_sglangs_key(launcher: Launcher, model: Path) -> None:
    weights = random_state_dict(model)
    with launcher.server(model, "--api-key", KEY) as server:
        with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
            report = publisher.publish()
        assert server.get("/model_info").status_code == 401
        assert server.post("/weightcast/commit", {}, headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
        theirs = httpx.get(f"{server.url}/model_info", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        assert theirs.json()["weight_version"] == report.version
        assert server.post("/continue_generation", {}, headers=server.headers).status_code == 401
