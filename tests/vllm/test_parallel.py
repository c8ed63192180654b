"""Several workers of one engine: all of them at one version, exactly."""

from pathlib import Path

import pytest
import torch
from tests.vllm.joining import WAYS, requests_go_on_meanwhile
from tests.vllm.offline import FreshLoads
from tests.vllm.stock import DEV_MODE, StockRoutes
from tests.vllm.weights import replace, verified

from weightcast import Publisher
from weightcast.errors import PlanMismatch
from weightcast.report import Report
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import vllm_server

PROMPTS = [[5, 17, 33, 2, 90], list(range(60, 100)), [7]]
PATIENT: dict[str, float] = {"timeout_s": 240, "silence_s": 60}
"""Two workers that wait for each other on two cores keep everything else from running for seconds."""
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("parallel") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.mark.parametrize("option", ["--tensor-parallel-size", "--data-parallel-size"], ids=["tp", "dp"])
def test_two_workers(model: Path, fresh: FreshLoads, option: str) -> None:
    # A replica computes what a single worker does; slices are summed up in another order.
    alike = {"tensor_parallel_size": 2} if option == "--tensor-parallel-size" else {}
    weights = random_state_dict(model)
    with vllm_server(model, option, "2", env=TWO_CORES | DEV_MODE) as served:
        assert served.get("/get_world_size").json() == {"world_size": 2}
        # Asking comes before any trainer: it settles nothing about who the workers are.
        listed = served.get("/weightcast/status?checksums=true", headers=served.headers).json()["details"]["checksums"]
        assert {name.partition(":")[0] for name in listed} == {"0", "1"}
        for way in WAYS if alike else ():
            requests_go_on_meanwhile(served, way)
        with Publisher(weights, [served.url], token=served.token, **PATIENT) as publisher:
            for _ in range(2):
                replace(weights, model)
                want = fresh.answers(model, weights, PROMPTS, **alike)
                assert served.answers(PROMPTS) != want
                report = publisher.publish()
                assert report.digests_match
                # Requests go round the replicas: each of them answers some.
                assert [served.answers(PROMPTS) for _ in range(3)] == [want] * 3
                assert served.version == report.version
                assert set(verified(served, model, weights).equal) == set(weights)
            check_shares(report, weights, sliced=bool(alike))
        with Publisher(weights, [StockRoutes(served)], **PATIENT) as stock:
            report = stock.publish()
            assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
            assert [served.answers(PROMPTS) for _ in range(2)] == [want] * 2
        del weights["model.layers.1.mlp.up_proj.weight"]
        with (
            Publisher(weights, [served.url], token=served.token, **PATIENT) as half,
            pytest.raises(PlanMismatch, match="gate_up_proj"),
        ):
            half.publish()
        assert [served.answers(PROMPTS) for _ in range(2)] == [want] * 2
        assert served.version == report.version


def check_shares(report: Report, weights: dict[str, torch.Tensor], *, sliced: bool) -> None:
    """Which part of all bytes each worker got."""
    assert [worker.rank for worker in report.engines[0].workers] == [0, 1]
    total = sum(value.nbytes for value in weights.values())
    shares = [worker.nbytes / total for worker in report.engines[0].workers]
    if sliced:
        # Norms are whole, everything else is sliced; the last slice of the vocabulary is padded.
        assert all(0.49 < share < 0.52 for share in shares), shares
    else:
        assert shares == [1.0, 1.0]
