"""Settings of SGLang that weights cannot be transferred with."""

from __future__ import annotations

from typing import Any

from weightcast.engines.sglang.versions import SUPPORTED
from weightcast.engines.stock.refused import Refused, refuse
from weightcast.errors import Unsupported

WITHOUT = "Start SGLang without it"
REFUSED = (
    Refused("tokenizer_worker_num", 1, "several tokenizer processes are", "Start SGLang with --tokenizer-worker-num 1"),
    Refused("quantization", None, "quantisation is", WITHOUT),
    Refused("speculative_algorithm", None, "speculative decoding is", WITHOUT),
    Refused("enable_dp_attention", False, "data-parallel attention is", WITHOUT),
    Refused("disaggregation_mode", "null", "disaggregated prefill is", WITHOUT),
    Refused("cpu_offload_gb", 0, "offloaded weights are", WITHOUT),
    Refused("offload_group_size", -1, "offloaded weights are", WITHOUT),
    Refused("kt_weight_path", None, "experts on the CPU are", WITHOUT),
    Refused("enable_eplb", False, "expert load balancing is", WITHOUT),
    Refused("init_expert_location", "trivial", "moved experts are", WITHOUT),
    Refused("ep_num_redundant_experts", 0, "redundant experts are", WITHOUT),
    Refused("elastic_ep_backend", None, "elastic expert parallelism is", WITHOUT),
    Refused("enable_hierarchical_cache", False, "a hierarchical cache, which keeps old keys and values, is", WITHOUT),
    Refused("enable_lmcache", False, "LMCache, which keeps old keys and values, is", WITHOUT),
    Refused("enable_flexkv", False, "FlexKV, which keeps old keys and values, is", WITHOUT),
    Refused("dllm_algorithm", None, "a diffusion model is", WITHOUT),
)
NOT_EVERYWHERE = {
    "torchao_config": ("quantisation by torchao", ("",)),
    "weight_cache_mode": ("SGLang's weight cache, which shares weights between engines,", ("off",)),
    "enable_lora": ("adapters (LoRA)", (None, False)),
    "lora_paths": ("adapters (LoRA)", (None,)),
}
"""Settings that some versions lack, or that have several harmless values."""


def refuse_settings(server_args: Any) -> None:
    """Raise Unsupported for the first setting that weights cannot be transferred with."""
    refuse(server_args, REFUSED, SUPPORTED)
    if server_args.pp_size > 1 and server_args.nnodes > 1:
        raise Unsupported(
            "a pipeline over several machines is not supported with weight transfer (pp_size, nnodes)",
            hint="Start SGLang with --tp-size instead",
        )
    for setting, (what, harmless) in NOT_EVERYWHERE.items():
        if getattr(server_args, setting, harmless[0]) not in harmless:
            raise Unsupported(f"{what} is not supported with weight transfer ({setting})", hint=WITHOUT)
