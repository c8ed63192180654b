"""Experts on two workers: exact, and a worker whose loader raises half-way leaves the engine at version n."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.vllm import offline
from tests.vllm.test_parallel import PATIENT, PROMPTS, TWO_CORES
from tests.vllm.weights import fill, replace
from torch.distributed.fsdp import fully_shard

from weightcast import Publisher
from weightcast.errors import RoundFailed
from weightcast.sources import checkpoint_tensors
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.ranks import run_ranks
from weightcast.testing.vllm_server import Served, vllm_server

Answers = list[tuple[list[int], list[float]]]
FAULTY = Path(__file__).parent / "faulty"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("experts") / "m", "qwen3_moe", dtype="bfloat16", head_dim=32)


@pytest.fixture(scope="module")
def faults(model: Path) -> Path:
    """A file in here, named like a worker's rank, has its loader raise after so many tensors, once."""
    folder = model.parent / "faults"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def served(model: Path, faults: Path) -> Iterator[Served]:
    paths = os.pathsep.join([str(FAULTY), os.environ.get("PYTHONPATH", "")])
    env = {**TWO_CORES, "PYTHONPATH": paths, "WEIGHTCAST_FAULTY_FOLDER": str(faults)}
    with vllm_server(model, "--tensor-parallel-size", "2", env=env) as running:
        yield running


@pytest.fixture(scope="module")
def start(served: Served) -> Answers:
    """What the server answers with the checkpoint that it was started with."""
    assert served.version == "default"
    return served.answers(PROMPTS)


@pytest.mark.parametrize("ranks", [(1,), (0, 1)], ids=["one worker", "both workers"])
@pytest.mark.parametrize("serving", ["as started", "published"])
def test_a_loader_that_raises_half_way_leaves_version_n(
    served: Served, model: Path, faults: Path, start: Answers, ranks: tuple[int, ...], serving: str
) -> None:
    """Until something was published the way back leads to the checkpoint, later to what was published last."""
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], token=served.token, **PATIENT) as publisher:
        if serving == "published":
            publisher.publish()
            replace(weights, model)
        publisher.connect()  # which tries the loader as well, on a twin
        before, version = served.answers(PROMPTS), served.version
        assert (before == start) == (version == "default") == (serving == "as started")
        for rank in ranks:
            (faults / str(rank)).write_text("9")
        with pytest.raises(RoundFailed, match="the loader stumbled") as caught:
            publisher.publish()
        assert not list(faults.iterdir()), "each of them stumbled"
        assert caught.value.dirty == ()
        assert (served.answers(PROMPTS), served.version) == (before, version)
        assert not served.get("/weightcast/status").json()["paused"]


def test_experts_are_those_of_a_fresh_load(served: Served, model: Path, start: Answers) -> None:
    """A fresh load of the checkpoint is the server's own start."""
    weights = random_state_dict(model)
    with Publisher(weights, [served.url], token=served.token, **PATIENT) as publisher:
        assert publisher.publish().digests_match
        assert served.answers(PROMPTS) != start
        fill(weights, load_file(model / "model.safetensors"))
        report = publisher.publish()
        assert report.digests_match
        assert (served.answers(PROMPTS), served.version) == (start, report.version)


def test_a_module_s_fused_experts_are_those_of_a_fresh_load(served: Served, model: Path, start: Answers) -> None:
    module = module_of(model)
    with Publisher(module, [served.url], token=served.token, **PATIENT) as publisher:
        for _ in range(2):
            fill(checkpoint_tensors(module), random_state_dict(model))
            assert publisher.publish().digests_match
            assert served.answers(PROMPTS) != start
        fill(checkpoint_tensors(module), load_file(model / "model.safetensors"))
        report = publisher.publish()
        assert report.digests_match
        assert (served.answers(PROMPTS), served.version) == (start, report.version)


def test_shards_of_fused_experts_are_those_of_a_fresh_load(
    served: Served, model: Path, start: Answers, tmp_path: Path
) -> None:
    """FSDP2 over three ranks, which divide neither the four experts nor most of the other tensors."""
    for is_random in (True, False):
        folder = tmp_path / str(is_random)
        folder.mkdir()
        versions = run_ranks(
            publish_shards, 3, str(folder), str(model), served.url, served.token, is_random, timeout_s=200
        )
        assert set(versions) == {served.version}
        assert (served.answers(PROMPTS) == start) != is_random


def publish_shards(rank: int, size: int, folder: str, model: str, url: str, token: str, is_random: bool) -> str:
    """Publish the checkpoint twice, or other values."""
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    module = module_of(Path(model))
    for layer in module.model.layers:
        fully_shard(layer)
    fully_shard(module)
    with Publisher(module, [url], token=token, **PATIENT) as publisher:
        for _ in range(2):
            with torch.no_grad():
                for value in module.parameters() if is_random else ():
                    value.to_local().mul_(torch.rand(()) + 1.5)
            report = publisher.publish()
            assert report.digests_match
    dist.destroy_process_group()
    return report.version


def module_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_whole_experts_go_to_the_worker_that_has_them(model: Path) -> None:
    """vLLM's CPU kernels cannot compute with expert parallelism, so weights are compared: each worker's, as it holds them."""
    weights = random_state_dict(model)
    with offline.engine(model, tensor_parallel_size=2, enable_expert_parallel=True) as llm:
        start = experts_of(llm)
        with Publisher(weights, [llm], **PATIENT) as publisher:
            assert publisher.publish().digests_match
            pushed = experts_of(llm)
            fill(weights, load_file(model / "model.safetensors"))
            assert publisher.publish().digests_match
        assert experts_of(llm) == start
    first, second = start
    assert first.keys() == second.keys() == pushed[0].keys()
    for name in first:
        assert len({first[name], second[name], pushed[0][name], pushed[1][name]}) == 4


def experts_of(llm: Any) -> list[dict[str, str]]:
    """Digests of the experts' live weights, worker by worker."""
    outcomes = llm.collective_rpc("weightcast_call", args=("checksums", {}))
    found = [{n: digest for n, digest in outcome["checksums"].items() if ".experts." in n} for outcome in outcomes]
    assert all(found)
    return found
