"""An SGLang that sleeps: SGLang's own code over a stand-in for its memory saver, whose library is CUDA's (see memory_saver.py)."""

from pathlib import Path

import pytest
from tests.sglang.launcher import SLEEPS
from tests.sglang.servers import Launcher, Server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.errors import Unsupported, WeightcastError
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace

BACKUP = "--enable-weights-cpu-backup"


@pytest.mark.parametrize("backup", [BACKUP, ""])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_an_engine_that_sleeps(launcher: Launcher, tmp_path: Path, backup: str, mode: str) -> None:
    model = build_tiny_model(tmp_path / "m", "qwen3", dtype="float32")
    weights = random_state_dict(model)
    options = ["--enable-memory-saver", backup] if backup else ["--enable-memory-saver"]
    with (
        launcher.server(model, *options, env={SLEEPS: "1"}) as server,
        Publisher(weights, [server.url], token=server.token, mode=mode, timeout_s=60) as publisher,
    ):
        version, before = publisher.publish().version, Reference(model, weights)
        assert_serves(server, before, version)
        for _ in range(2):
            ask(server, "release", [])
            replace(weights, model)
            with pytest.raises(WeightcastError, match="asleep"):
                publisher.publish()
            assert server.status["weight_version"] == (version if backup else "none")
            ask(server, "resume", ["weights"])
            ask(server, "resume", ["kv_cache", "cuda_graph"])
            if backup:
                assert_serves(server, before, version)
            else:
                assert (server.status["weight_version"], server.status["ready"]) == ("none", False)
                assert server.answers(PROMPTS) != before.answers(), "the weights are garbage"
            version, before = publisher.publish().version, Reference(model, weights)
            assert_serves(server, before, version)
        # One call wakes the weights up, publishes, and wakes the rest up.
        ask(server, "release", [])
        replace(weights, model)
        version = publisher.publish(wake=True).version
        assert_serves(server, Reference(model, weights), version)


def test_without_a_memory_saver_nothing_is_given_away(launcher: Launcher, tmp_path: Path) -> None:
    """SGLang takes the routes then as well, and keeps its memory: rounds go on, and what SGLang puts back is not of former weights."""
    model = build_tiny_model(tmp_path / "m", "gemma3", dtype="float32")
    weights = random_state_dict(model)
    with (
        launcher.server(model) as server,
        Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher,
    ):
        for _ in range(2):
            ask(server, "release", [])
            replace(weights, model)
            version = publisher.publish().version
            ask(server, "resume", [])
            assert_serves(server, Reference(model, weights), version)
        with pytest.raises(Unsupported, match=r"without its memory saver.*--enable-memory-saver"):
            publisher.publish(wake=True)
        assert_serves(server, Reference(model, weights), version)


def ask(server: Server, what: str, tags: list[str]) -> None:
    answer = server.post(f"/{what}_memory_occupation", {"tags": tags} if tags else {})
    assert answer.status_code == 200, answer.text


def assert_serves(server: Server, fresh: Reference, version: str) -> None:
    assert server.answers(PROMPTS) == fresh.answers()
    assert server.version == server.status["weight_version"] == version
    assert server.status["ready"]
    found = comparison(server.url, server.token, fresh.checkpoint)
    assert (found.version, found.proven) == (version, True)
