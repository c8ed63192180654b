"""Several workers, several engines: all of them at one version, exactly."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.vllm.offline import FreshLoads

from weightcast import Publisher
from weightcast.errors import PlanMismatch, WeightcastError
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import free_port, vllm_server

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("parallel") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.mark.parametrize("option", ["--tensor-parallel-size", "--data-parallel-size"], ids=["tp", "dp"])
def test_two_workers(model: Path, fresh: FreshLoads, option: str) -> None:
    weights = random_state_dict(model)
    # A replica computes what a single worker does; slices are summed up in another order.
    alike = {"tensor_parallel_size": 2} if option == "--tensor-parallel-size" else {}
    want = fresh.answers(model, weights, PROMPTS, **alike)
    with (
        vllm_server(model, option, "2", env=TWO_CORES) as served,
        Publisher(random_state_dict(model), [served.url], token=served.token, timeout_s=60) as first,
    ):
        assert served.get("/get_world_size").json() == {"world_size": 2}
        report = first.publish()
        assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
        total = sum(value.nbytes for value in weights.values())
        shares = [worker.nbytes / total for worker in report.engines[0].workers]
        if alike:
            # Norms are whole, everything else is sliced; the last slice of the vocabulary is padded.
            assert all(0.49 < share < 0.52 for share in shares), shares
        else:
            assert shares == [1.0, 1.0]
        assert served.answers(PROMPTS) != want
        with Publisher(weights, [served.url], token=served.token, timeout_s=60, takeover=True) as second:
            report = second.publish()
        assert report.digests_match
        # Requests go round the replicas: each of them answers some.
        assert [served.answers(PROMPTS) for _ in range(3)] == [want] * 3
        assert served.version == report.version
        del weights["model.layers.1.mlp.up_proj.weight"]
        with (
            Publisher(weights, [served.url], token=served.token, timeout_s=20, takeover=True) as half,
            pytest.raises(PlanMismatch, match="gate_up_proj"),
        ):
            half.publish()
        assert [served.answers(PROMPTS) for _ in range(2)] == [want] * 2
        assert served.version == report.version


def test_one_publisher_drives_vllm_and_an_embedded_server(model: Path) -> None:
    port, weights = free_port(), random_state_dict(model)
    command = [str(Path(sys.executable).parent / "weightcast"), "serve", str(model), "--port", str(port)]
    embedded = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with vllm_server(model) as served:
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
                with pytest.raises(WeightcastError):
                    publisher.publish(timeout_s=8)
                assert (served.answers(PROMPTS), served.version) == (before, report.version)
    finally:
        embedded.kill()
        embedded.wait(10)
