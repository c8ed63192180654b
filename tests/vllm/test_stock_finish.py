"""vLLM's own route that ends an update: a round that failed gives no version its name, and dirty weights serve nobody."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("stock") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with vllm_server(model, env={"VLLM_SERVER_DEV_MODE": "1"}) as running:
        yield running


def test_a_failed_update_is_not_named(served: Served, model: Path) -> None:
    with Publisher(random_state_dict(model), [served.url], token=served.token) as publisher:
        version = publisher.publish().version
        assert served.get("/weight_info").json()["weight_version"] == version
        assert served.post("/pause?mode=keep").status_code == 200
        assert served.post("/start_weight_update").status_code == 200
        update = {"update_info": {"epoch": 99, "round": 99, "action": "commit", "timeout_s": 1}}
        assert served.post("/update_weights", update).status_code == 200, "workers never raise"
        answer = served.post("/finish_weight_update", {"weight_version": "no-such"})
        assert answer.status_code == 424, answer.text
        assert answer.json()["error"]["type"] == "DeadlineExceeded"
        assert served.get("/weight_info").json()["weight_version"] == version
        assert served.get("/weightcast/status").json()["weight_version"] == version
        assert served.post("/resume").status_code == 200
        assert publisher.publish().digests_match
