"""A worker's rank as vLLM counts it, and the set-ups that are refused.

Tensor, pipeline, data and expert parallelism are mapped: experts are divided over the same workers, so they add no rank of
their own.
"""

from __future__ import annotations

from typing import Any

from weightcast.engines.stock.refused import Refused, refuse, setting_of
from weightcast.engines.vllm.drafts import METHODS
from weightcast.engines.vllm.versions import SUPPORTED
from weightcast.errors import Unsupported
from weightcast.weight_transfer.base import WorkerRank

WEIGHTLESS_DRAFTS = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Methods of speculation that propose tokens without a model of their own."""


REFUSED = (
    Refused("parallel_config.prefill_context_parallel_size", 1, "prefill context parallelism is", "Set it to 1"),
    Refused("parallel_config.decode_context_parallel_size", 1, "decode context parallelism is", "Set it to 1"),
    Refused(
        "parallel_config.enable_eplb",
        False,
        "expert load balancing moves experts between workers, which is",
        "Switch it off",
    ),
    Refused(
        "parallel_config.data_parallel_external_lb",
        False,
        "external data-parallel load balancing hides the other replicas, which is",
        "Switch it off",
    ),
    Refused(
        "parallel_config.data_parallel_hybrid_lb",
        False,
        "hybrid data-parallel load balancing hides the other replicas, which is",
        "Switch it off",
    ),
    Refused(
        "parallel_config.enable_elastic_ep",
        False,
        "elastic expert parallelism changes the set of workers, which is",
        "Switch it off",
    ),
    Refused("offload_config.uva.cpu_offload_gb", 0, "weights offloaded to the CPU are", "Set it to 0"),
    Refused("offload_config.prefetch.offload_group_size", 0, "layers offloaded to the CPU are", "Set it to 0"),
)


def worker_rank(vllm_config: Any) -> WorkerRank:
    """Return the worker's rank, which is ``data_parallel_index * (tp * pp) + rank within the replica``. Raises Unsupported for a set-up
    that weightcast does not map."""
    refuse(vllm_config, REFUSED, SUPPORTED)
    _refuse_drafts(vllm_config)
    parallel = vllm_config.parallel_config
    rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
    # Replicas of a dense model run as engines of their own and are not told how many they are; whoever has them join is.
    return WorkerRank(rank=rank, world_size=max(parallel.world_size_across_dp, rank + 1))


def _refuse_drafts(vllm_config: Any) -> None:
    """Refuse models to speculate with that nobody tried a round on, and drafts that are on one stage of several."""
    speculation = setting_of(vllm_config, "speculative_config", SUPPORTED)
    if speculation is None or speculation.method in WEIGHTLESS_DRAFTS:
        return
    if speculation.method not in METHODS:
        raise Unsupported(
            f"a speculative model of this kind ({speculation.method}) would keep its old weights, which is not supported with "
            "weight transfer (speculative_config)",
            hint=f"Speculate with one of {', '.join(sorted(METHODS))}, without a model (ngram, suffix), or not at all",
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise Unsupported(
            f"speculating with a model ({speculation.method}) and pipeline parallelism are not supported together with weight transfer",
            hint="Set pipeline_parallel_size to 1, or speculate without a model (ngram, suffix)",
        )
