"""A rank of TRL's GRPO trainer among several, told by torchrun's variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.frameworks.served import Served
from tests.frameworks.trl_runs import GROUP, PROMPTS, After, grpo, rollouts

from weightcast.integrations.trl import PublishCallback, use_in_server_mode


def train_both_ways(rank: int, size: int, served: Served, folder: Path, port: int) -> tuple[int, int]:
    """Train with the callback, then in server mode: how many versions were found equal to what rank 0 saved."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert dist.is_available()
    served.versions.clear()
    share = {"per_device_train_batch_size": len(PROMPTS) * GROUP // size}

    def look(policy: Any) -> None:
        if rank == 0:
            served.holds_model(policy)
        dist.barrier()

    callbacks = [PublishCallback([served.url], token=served.token), After(look)]
    grpo(served, folder / "callback", callbacks=callbacks, rollout_func=rollouts(served), **share).train()
    assert dist.get_world_size() == size
    by_callback = len(set(served.versions))
    use_in_server_mode(token=served.token)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served.url}
    trainer = grpo(served, folder / "server", callbacks=[], **server, **share)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    look(trainer.model)
    if rank == 0:
        trainer.vllm_generation.vllm_client.close_communicator()
    dist.destroy_process_group()
    return by_callback, len(set(served.versions)) - by_callback
