"""Tiny transformers modules with fused experts, fresh values for them, and what they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
EXPERTS = {"num_experts": 5, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 8}
GROUPED = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
ARCHS: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40},
    "mixtral": {"num_local_experts": 5},
    "deepseek_v3": {**GROUPED, **LATENT},
    "glm4_moe": {**GROUPED, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 5, "head_dim": 8},
    "olmoe": {"num_experts": 5},
}


def new_model(arch: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **{**COMMON, **ARCHS[arch]}))
    return model.to(torch.bfloat16 if arch in ("glm4_moe", "olmoe") else torch.float32)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """The same random values for every model of this form that gets the same seed, buffers included."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        whole = torch.randn(value.shape, generator=generator).to(value.dtype)
        if isinstance(value, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
                whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
            value.to_local().copy_(whole)
        else:
            value.copy_(whole)


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the model's own ``save_pretrained`` writes."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def random_seed() -> int:
    return int(torch.randint(2**40, ()))
