"""A worker's rank as vLLM counts it, and the set-ups that are refused."""

from __future__ import annotations

from typing import Any

from weightcast.errors import Unsupported
from weightcast.weight_transfer.base import WorkerRank


def worker_rank(vllm_config: Any) -> WorkerRank:
    """``data_parallel_index * (tp * pp) + rank within the replica``; raises Unsupported for a set-up nobody mapped."""
    parallel = vllm_config.parallel_config
    _refuse(vllm_config, parallel)
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
    # Replicas of a dense model run as engines of their own and are not told how many they are; whoever has them join is.
    return WorkerRank(rank=rank, world_size=max(parallel.world_size_across_dp, rank + 1))


def _refuse(vllm_config: Any, parallel: Any) -> None:
    for name, what in (
        ("prefill_context_parallel_size", "prefill context parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            raise Unsupported(f"{what} ({name}) is not supported with weight transfer", hint="Set it to 1")
    for name, what in (
        ("enable_eplb", "expert load balancing moves experts between workers, which"),
        ("data_parallel_external_lb", "external data-parallel load balancing hides the other replicas, which"),
        ("data_parallel_hybrid_lb", "hybrid data-parallel load balancing hides the other replicas, which"),
        ("enable_elastic_ep", "elastic expert parallelism changes the set of workers, which"),
    ):
        if getattr(parallel, name, False):
            raise Unsupported(f"{what} is not supported with weight transfer", hint=f"Switch {name} off")
    if getattr(vllm_config, "lora_config", None) is not None:
        raise Unsupported("LoRA adapters are not supported with weight transfer", hint="Serve merged weights")
    offload = getattr(getattr(vllm_config, "cache_config", None), "cpu_offload_gb", 0)
    if offload:
        raise Unsupported("weights offloaded to the CPU are not supported with weight transfer")
