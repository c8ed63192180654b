"""Several workers, several engines: all of them at one version, exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.vllm.offline import fresh_answers
from tests.vllm.served import free_port, server

from weightcast import Publisher
from weightcast.errors import RoundFailed
from weightcast.testing.models import build_tiny_model, random_state_dict

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("parallel") / "m", "qwen3", dtype="float32", head_dim=32)


@pytest.mark.parametrize(
    "option", ["--tensor-parallel-size", "--data-parallel-size", "--pipeline-parallel-size"], ids=["tp", "dp", "pp"]
)
def test_two_workers(model: Path, option: str) -> None:
    weights = random_state_dict(model)
    with (
        server(model, option, "2", env=TWO_CORES) as served,
        Publisher(weights, [served.url], token=served.token, timeout_s=60) as publisher,
    ):
        assert served.get("/get_world_size").json() == {"world_size": 2}
        publisher.connect()
        for number in (1, 2):
            for name, value in random_state_dict(model).items():
                weights[name].copy_(value)
            report = publisher.publish()
            assert report.number == number
            assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
            assert report.digests_match
            assert served.version == report.version
        want = fresh_answers(model, weights, PROMPTS)
        got = [served.answers(PROMPTS) for _ in range(2)]  # with two replicas, requests go to either
        version = served.version
        del weights["model.layers.1.mlp.up_proj.weight"]
        with (
            Publisher(weights, [served.url], token=served.token, timeout_s=20, takeover=True) as half,
            pytest.raises(Exception, match="gate_up_proj"),
        ):
            half.publish()
        assert (served.answers(PROMPTS), served.version) == (got[0], version)
    for answers in got:
        assert [ids for ids, _ in answers] == [ids for ids, _ in want]
        for (_, logprobs), (_, wanted) in zip(answers, want, strict=True):
            assert logprobs == pytest.approx(wanted, abs=1e-4)


def test_one_publisher_drives_vllm_and_an_embedded_server(model: Path) -> None:
    port, weights = free_port(), random_state_dict(model)
    command = [sys.executable, "-m", "weightcast", "serve", str(model), "--port", str(port)]
    embedded = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with server(model) as served:
            url = f"http://127.0.0.1:{port}"
            with Publisher(weights, [served.url, url], token=served.token, timeout_s=60) as publisher:
                publisher.connect()
                report = publisher.publish()
                assert {engine.version for engine in report.engines} == {report.version}
                assert served.version == report.version
                for name, value in random_state_dict(model).items():
                    weights[name].copy_(value)
                embedded.kill()
                embedded.wait(10)
                before = served.answers(PROMPTS)
                with pytest.raises((RoundFailed, Exception)):
                    publisher.publish(timeout_s=8)
                assert (served.answers(PROMPTS), served.version) == (before, report.version)
    finally:
        embedded.kill()
        embedded.wait(10)
