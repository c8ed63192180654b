"""Several workers: all of them at one version, exactly, and all back at the one before when one of them fails."""

import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.sglang.launcher import FAULT
from tests.sglang.servers import Launcher, Server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import PlanMismatch, RoundFailed
from weightcast.testing.engine_suite import AFTERWARDS, MIDWAY, NEVER_ENDING, STORY
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace

TWO_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
ROOM = ("--context-length", str(NEVER_ENDING + 64), "--max-total-tokens", str(3 * NEVER_ENDING))
"""Two requests that only the test ends fit in."""


@pytest.mark.parametrize("option", ["--tp-size", "--dp-size", "--pp-size"])
def test_two_workers(launcher: Launcher, tmp_path: Path, option: str) -> None:
    model = build_tiny_model(tmp_path / "m", "qwen3", dtype="float32", max_position_embeddings=NEVER_ENDING + 64)
    fault = tmp_path / "fault"
    weights = random_state_dict(model)
    with launcher.server(model, *ROOM, option, "2", env={**TWO_CORES, FAULT: str(fault)}) as server:
        assert server.get("/get_world_size").json() == {"world_size": 2}
        for mode in ("staged", "in_place"):
            with Publisher(weights, [server.url], token=server.token, timeout_s=60, mode=mode) as publisher:
                for _ in range(2):
                    replace(weights, model)
                    report = publisher.publish()
                    assert report.digests_match
                    assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
                    assert_serves(server, Reference(model, weights), report.version)
                    found = comparison(server.url, server.token, Reference(model, weights).checkpoint)
                    assert set(found.equal) == set(weights)
        for clear_cache in (True, False):
            assert_requests_go_on_in_the_next_version(server, weights, model, clear_cache)
        with Publisher(weights, [server.url], token=server.token, timeout_s=60, mode="staged") as publisher:
            before, version = Reference(model, weights), publisher.publish().version
            for rank in (1, 0):
                replace(weights, model)
                fault.write_text(str(rank))
                with pytest.raises(RoundFailed, match=f"worker {rank}"):
                    publisher.publish()
                assert not fault.exists(), "the fault was met"
                assert_serves(server, before, version)
            report = publisher.publish()
            assert_serves(server, Reference(model, weights), report.version)
        with Publisher(weights, [server.url], token=server.token, timeout_s=20, mode="in_place") as publisher:
            publisher.publish()
            replace(weights, model)
            fault.write_text("1")
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
            assert not fault.exists(), "the fault was met"
            assert_is_held(server, caught.value)
            report = publisher.publish()
            assert_serves(server, Reference(model, weights), report.version)
        half = {name: value for name, value in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
        with (
            Publisher(half, [server.url], token=server.token, timeout_s=20) as publisher,
            pytest.raises(PlanMismatch, match="gate_up_proj"),
        ):
            publisher.publish()
        assert_serves(server, Reference(model, weights), report.version)


@pytest.mark.parametrize("arch", ["qwen3_tied", "qwen3_moe"])
def test_a_pipeline_of_other_models(launcher: Launcher, tmp_path: Path, arch: str) -> None:
    """The last stage has a head of its own where embedding and head are one tensor of the trainer's."""
    model = build_tiny_model(tmp_path / "m", arch, dtype="float32")
    weights = random_state_dict(model)
    with launcher.server(model, "--pp-size", "2", env=TWO_CORES) as server:
        for mode in ("staged", "in_place"):
            with Publisher(weights, [server.url], token=server.token, timeout_s=60, mode=mode) as publisher:
                for _ in range(2):
                    replace(weights, model)
                    report = publisher.publish()
                    fresh = Reference(model, weights)
                    assert_serves(server, fresh, report.version)
                    assert comparison(server.url, server.token, fresh.checkpoint).proven


def assert_serves(server: Server, fresh: Reference, version: str) -> None:
    """Requests go round the replicas: each of them answers some."""
    assert [server.answers(PROMPTS) for _ in range(2)] == [fresh.answers()] * 2
    assert server.version == server.status["weight_version"] == version
    assert {server.generate([7])["meta_info"]["weight_version"] for _ in range(4)} == {version}
    assert not server.status["paused"]


def assert_is_held(server: Server, failed: RoundFailed) -> None:
    """One worker has the new weights, the other one the old ones: nothing is computed with them."""
    assert server.url in failed.dirty
    status = server.status
    assert (status["ready"], status["dirty"], status["paused"]) == (False, True, True)
    assert server.post("/continue_generation", {}).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        server.post("/generate", {"input_ids": [7], "sampling_params": {"max_new_tokens": 1}}, timeout=1.5)
    assert server.get("/ready").status_code == 503


def assert_requests_go_on_in_the_next_version(server: Server, weights: dict, model: Path, clear_cache: bool) -> None:
    """Two requests, one for each replica: both are there when the round comes, and every token is of the version that it names, unless
    keys and values of the version before are kept.

    A round that aborts requests ends them, once both have tokens of the next version."""
    former, before = server.version, Reference(model, weights)
    begun, deadline = threading.Barrier(3), Deadline(120)
    last: list[dict] = [{}, {}]

    def ask(number: int) -> None:
        waits = True
        for part in server.stream([*STORY, number], NEVER_ENDING):
            last[number] = part
            if waits and len(part["output_ids"]) >= MIDWAY:
                waits = False
                begun.wait(120)

    def of(fresh: Reference, number: int) -> list[bool]:
        return fresh.follows([*STORY, number, *last[number]["output_ids"]], len(STORY) + 1)

    replace(weights, model)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    begun.wait(120)
    with Publisher(weights, [server.url], token=server.token, timeout_s=60, clear_cache=clear_cache) as publisher:
        version = publisher.publish().version
    after = Reference(model, weights)
    while not all(False in of(before, number)[:-AFTERWARDS] for number in range(2)):
        deadline.check("tokens of the next version")
        time.sleep(0.05)
    with Publisher(weights, [server.url], token=server.token, timeout_s=60, pause="abort") as publisher:
        publisher.publish()
    for thread in threads:
        thread.join(120)
    for number, answer in enumerate(last):
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "abort"
        assert [span["version"] for span in meta["weight_versions"]] == [former, version]
        cut = meta["weight_versions"][0]["end"]
        assert all(of(before, number)[:cut])
        assert all(of(after, number)[cut:]) or not clear_cache
