"""A rank of a trainer that SkyRL's own function gives a sender, with SkyRL's own source over an FSDP2 module."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tests.support.verified import comparison
from tests.vllm.skyrl_package import open_skyrl

from weightcast.testing.models import save_checkpoint

TOKENS = torch.tensor([[5, 17, 33, 2, 90, 44]])


def sync(rank: int, size: int, store: str, model: str, url: str, token: str, num_rounds: int) -> list[Any]:
    """Learn and sync so many times; rank 0 tells what was live behind each sync and where it saved what it holds."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    open_skyrl()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in policy.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    engine = engine_of(rank, policy, url)
    found = []
    for number in range(num_rounds):
        loss = policy(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.send_weights()
        held = {name: value.full_tensor().to(torch.bfloat16) for name, value in policy.state_dict().items()}
        if rank == 0:
            saved = save_checkpoint(Path(f"{store}-{number}"), held, like=Path(model))
            live = comparison(url, token, saved)
            found.append((loss.item(), live.proven, sorted(live.equal) == sorted(held), live.version, str(saved)))
        dist.barrier()
    shut_down(engine)
    dist.destroy_process_group()
    return found


def engine_of(rank: int, policy: torch.nn.Module, url: str) -> Any:
    """What a SkyRL worker has to send with."""
    from skyrl.backends.skyrl_train.weight_sync.sources import FsdpWeightSource
    from skyrl.backends.skyrl_train.weight_sync.weight_senders import build_trainer_engine, maybe_set_reset_prefix_cache
    from skyrl.train.config import InferenceEngineConfig

    from weightcast.integrations.skyrl import register

    register()
    engine = build_trainer_engine(
        ie_cfg=InferenceEngineConfig(weight_sync_backend="weightcast", model_dtype="bfloat16"),
        colocate_all=False,
        rank=rank,
        inference_world_size=1,
        source_factory=lambda dtype, backend: FsdpWeightSource(policy, dtype),
        draft_source_factory=lambda dtype: None,
        server_urls=[url],
        data_parallel_size=1,
    )
    maybe_set_reset_prefix_cache(engine, True)
    assert engine.skyrl_handles_prefix_cache_reset
    assert not engine.skyrl_force_disable_expandable_segments
    assert engine.skyrl_empty_cache_after_send
    return engine


def shut_down(engine: Any) -> None:
    from skyrl.backends.skyrl_train.weight_sync.weight_senders import teardown_engine

    teardown_engine(engine)
