"""A stock vLLM server without a token and without a checkpoint folder, which trusts forwarding headers of anybody: proxies and pages of
other sites get nowhere, and no trainer has the engine open a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.hostile import repeating_landings
from tests.support.verified import comparison
from tests.vllm.weights import replace, verified

from weightcast import Publisher
from weightcast.errors import Unsupported
from weightcast.layout import most_placements
from weightcast.manifest import Manifest, TensorSpec
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.transports.files import CHECKPOINT_ROOT
from weightcast.transports.shm import ShmTransport

OPEN = ["/weightcast/status", "/weightcast/rounds", "/weightcast", "/weightcast/metrics", "/get_world_size", "/ready"]
GUARDED = ["init", "commit", "rollback", "shutdown", "digests"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("strangers") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with vllm_server(model, env={"WEIGHTCAST_TOKEN": "", "FORWARDED_ALLOW_IPS": "*", CHECKPOINT_ROOT: ""}) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.9"},
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "evil.example"},
        {"Origin": "https://evil.example", "Content-Type": "text/plain"},
        {"Origin": "http://127.0.0.1:1", "Content-Type": "text/plain"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
    ids=lambda headers: " ".join(headers),
)
def test_what_comes_through_a_proxy_or_from_a_page_is_refused(served: Served, headers: dict[str, str]) -> None:
    for path in GUARDED:
        answer = httpx.post(f"{served.url}/weightcast/{path}", content=b"{}", headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError"), path
    for path in OPEN:
        answer = httpx.get(served.url + path, headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthError"), path


def test_this_machine_publishes_without_a_token(served: Served, model: Path) -> None:
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], timeout_s=60) as publisher:
        replace(weights, model)
        assert publisher.publish().digests_match
    page = httpx.get(f"{served.url}/weightcast", timeout=30)
    assert page.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


def test_files_of_a_folder_that_nobody_allowed_are_not_opened(
    served: Served, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = served.version
    for number in range(2):
        checkpoint = save_checkpoint(tmp_path / str(number), random_state_dict(model), model)
        with (
            Publisher(checkpoint, [served.url], transport="shm", timeout_s=60) as publisher,
            pytest.raises(Unsupported, match=r"the engine opens no files in .*--checkpoint-root"),
        ):
            publisher.connect()
        # A trainer that knows it and offers the file all the same.
        with monkeypatch.context() as hostile:
            hostile.setattr(ShmTransport, "refusal", lambda *_: None)
            with (
                Publisher(checkpoint, [served.url], transport="shm", timeout_s=60) as publisher,
                pytest.raises(Unsupported, match="this engine opens no files in"),
            ):
                publisher.publish()
        assert served.version == version
        with Publisher(checkpoint, [served.url], timeout_s=60) as publisher:
            report = publisher.publish()
        assert report.digests_match
        assert {worker.transport for engine in report.engines for worker in engine.workers} == {"tcp"}
        found = comparison(served.url, served.token, checkpoint)
        assert found.proven
        assert len(found.equal) == len(random_state_dict(model))
        version = report.version


def test_an_engine_that_wants_one_thing_without_end_does_not_fail_vllm(served: Served, model: Path) -> None:
    weights = random_state_dict(model)
    most = most_placements(
        Manifest.of(
            TensorSpec(name=name, dtype="bfloat16", shape=tuple(value.shape)) for name, value in weights.items()
        )
    )
    for count in (most, 200_000):
        hostile = LocalEngine("hostile", [DictModel(random_state_dict(model))], mode="staged")
        with (
            repeating_landings("hostile", count),
            Publisher(weights, [hostile, served.url], timeout_s=20, require="live") as publisher,
        ):
            replace(weights, model)
            report = publisher.publish()
        assert {engine.name: engine.ok for engine in report.engines}[served.url]
        assert hostile.workers[0].weight_version == "default"
        assert served.version == report.version
        assert verified(served, model, weights).proven
