"""Two GPUs: a module under FSDP2 on two trainer ranks, into a vLLM server with two workers on the same two GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_vllm import tiny_model, vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.testing.ranks import Peer

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANKS = 2


class TrainerRank:
    """One rank of the trainer; rank 0 lives in the test's process."""

    def start(self, rank: int, folder: str, paths: dict[str, str]) -> None:
        """Join the group and hold every checkpoint of ``paths`` as a sharded module, and one more that is published."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import AutoModelForCausalLM

        torch.cuda.set_device(rank)
        store = dist.FileStore(f"{folder}/store", RANKS)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
        )
        mesh = init_device_mesh("cuda", (RANKS,))

        def sharded(path: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(f"cuda:{rank}")
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        self.models = {name: sharded(path) for name, path in paths.items()}
        self.source = sharded(next(iter(paths.values())))

    def connect(self, url: str, token: str, options: dict[str, Any]) -> None:
        self.publisher = Publisher(
            self.source, [url], token=token, timeout_s=100, process_group=dist.group.WORLD, **options
        )
        self.publisher.connect()

    @torch.no_grad()
    def publish(self, name: str) -> tuple[bool, list[str]]:
        """Give the module the values of a checkpoint, shard by shard, and publish it."""
        for parameter, other in zip(self.source.parameters(), self.models[name].parameters(), strict=True):
            parameter.to_local().copy_(other.to_local())
        report = self.publisher.publish()
        return report.digests_match, [worker.transport for engine in report.engines for worker in engine.workers]

    def close(self) -> None:
        self.publisher.close()
        dist.destroy_process_group()


class Both:
    """The same call on both ranks at once."""

    def __init__(self, own: TrainerRank, other: Peer) -> None:
        self.own, self.other = own, other

    def call(self, method: str, *args: Any) -> Any:
        self.other.start(method, *args)
        try:
            return getattr(self.own, method)(*args)
        finally:
            self.other.result(120)


@contextmanager
def trainer(tmp_path: Path, paths: dict[str, str]) -> Iterator[Both]:
    with ExitStack() as stack:
        other = stack.enter_context(Peer(TrainerRank, rank=1))
        both = Both(TrainerRank(), other)
        other.start("start", 1, str(tmp_path), paths)
        both.own.start(0, str(tmp_path), paths)
        other.result(120)
        try:
            yield both
        finally:
            both.call("close")


@pytest.mark.parametrize(
    ("arch", "options"),
    [("qwen3_moe", {"mode": "in_place"}), ("qwen3", {"mode": "staged", "transport": "nccl"})],
    ids=["MoE in place", "dense staged nccl"],
)
def test_an_fsdp2_module_into_a_server_with_two_workers(tmp_path: Path, arch: str, options: dict[str, Any]) -> None:
    model = tiny_model(tmp_path / "m", arch)
    paths = {name: save_checkpoint(tmp_path / name, random_state_dict(model), like=model) for name in ("a", "b", "c")}
    serve = ("--tensor-parallel-size", "2", "--enforce-eager")
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    seen = {}
    with vllm_server(paths["a"], "weightcast", *serve, **devices) as server:
        seen["a"] = server.answers()
        with trainer(tmp_path, {name: str(paths[name]) for name in ("b", "a", "c")}) as both:
            both.call("connect", server.url, server.token, options)  # type: ignore[attr-defined]
            for name in ("b", "c", "a", "b"):
                proven, transports = both.call("publish", name)
                assert proven
                assert len(transports) == 2
                assert set(transports) == {options.get("transport", "cuda_ipc")}
                assert comparison(server.url, server.token, paths[name]).proven, f"live weights are those of {name}"  # type: ignore[attr-defined]
                assert seen.setdefault(name, server.answers()) == server.answers()
            assert len({str(tokens) for tokens in seen.values()}) == 3
    (tmp_path / "store").unlink(missing_ok=True)
    with vllm_server(paths["b"], "weightcast", *serve, **devices) as server:
        assert server.answers() == seen["b"], "published, and loaded afresh"
