"""A rank of a trainer under DeepSpeed's ZeRO-3."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.frameworks.served import Served

TOKENS = torch.tensor([[5, 17, 33, 2, 90, 44]])


def train(rank: int, size: int, served: Served, store: str, num_rounds: int) -> list[float]:
    """Learn and publish so many times, and have rank 0 look whether the server holds what DeepSpeed gathers at once; the losses."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from transformers import AutoModelForCausalLM

    from weightcast import Publisher
    from weightcast.integrations.deepspeed import gathered

    # An operator of DeepSpeed's for CPUs, which takes a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    files = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    deepspeed.init_distributed(dist_backend="gloo")
    policy = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    engine = zero(policy, size)
    refused(engine.module)
    engines = [served.url] if rank == 0 else []
    losses = []
    with Publisher(
        lambda: gathered(engine.module), engines, token=served.token, process_group=torch.distributed.group.WORLD
    ) as publisher:
        for number in range(num_rounds):
            loss = engine(input_ids=TOKENS, labels=TOKENS).loss
            engine.backward(loss)
            engine.step()
            assert publisher.publish().digests_match
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
                if rank == 0:
                    checkpoint = Path(f"{store}-{number}")
                    held = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
                    engine.module.save_pretrained(checkpoint, state_dict=held)
                    served.holds(checkpoint)
            losses.append(loss.item())
    versions = len(set(served.versions)) if rank == 0 else num_rounds
    assert versions == num_rounds
    dist.destroy_process_group()
    return losses


def zero(policy: Any, size: int) -> Any:
    import deepspeed

    config = {
        "train_batch_size": size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    return deepspeed.initialize(model=policy, optimizer=optimizer, config=config)[0]


def refused(module: Any) -> None:
    """A module whose values are elsewhere is named for what it is, with the lines that publish it."""
    from weightcast.errors import Unsupported
    from weightcast.sources import make_source

    assert all(parameter.numel() == 0 for parameter in module.parameters())
    with pytest.raises(Unsupported, match="is a ZeRO-3 parameter") as caught:
        make_source(module)
    assert "gathered(module), engines, process_group=torch.distributed.group.WORLD" in str(caught.value)
