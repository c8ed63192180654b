"""publish(wait=False) of several ranks: each of them takes its part at its own call, and all are told of one round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from weightcast import Publisher
from weightcast.errors import StateError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24, bias=False))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 24)).square().mean().backward()
    optimizer.step()


def publish_beside(rank: int, size: int, folder: str) -> list[Any]:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    torch.manual_seed(5)
    model, whole = small_model(), small_model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engines = [LocalEngine("e", [DictModel(whole.state_dict())])] if rank == 0 else []
    told: list[Any] = []
    try:
        with Publisher(model, engines, transport="tcp" if size == 2 else "shm", timeout_s=30) as publisher:
            for _ in range(3):
                learn(model, optimizer)
                truth = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
                round_ = publisher.publish(wait=False)
                learn(model, optimizer)
                report = round_.wait()
                told.append((report.version, report.digests_match))
                assert rank or engines[0].models[0].holds(truth)
            if rank == 1:
                model.append(nn.Linear(2, 2))
            round_ = publisher.publish(wait=False)
            with pytest.raises(StateError, match=r"trainer rank 1: .*3\.weight"):
                round_.wait()
    finally:
        for engine in engines:
            engine.stop()
    dist.destroy_process_group()
    return told


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_publish_what_each_of_them_held_at_its_call(tmp_path: Path, size: int) -> None:
    told = run_ranks(publish_beside, size, str(tmp_path), timeout_s=100)
    assert len({version for version, _ in told[0]}) == 3
    assert all(each == told[0] for each in told)
    assert all(matches for _, matches in told[0])
