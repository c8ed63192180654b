"""Tiny models on disk: config, random safetensors weights and a tokenizer, in the format of a Hugging Face checkpoint.

Weights are scaled so that greedy tokens vary along an output and differ between seeds: equal tokens mean equal weights.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightcast.errors import InvalidInput
from weightcast.manifest.dtypes import dtype_of
from weightcast.testing.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE, build_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_HEAD = {"head_dim": 16}
_WINDOWED = {"head_dim": 16, "sliding_window": 12}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
_MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 8, "chunk_size": 16, "intermediate_size": 128}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
_NEMOTRON = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "head_dim": 32}
_GRANITE = {
    **_HYBRID,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "position_embedding_type": "rope",
}
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _HEAD),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", _HEAD),
    "qwen3_tied": ("qwen3", {**_HEAD, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {**_HEAD, **_MOE}),
    "mistral": ("mistral", _WINDOWED),
    "gemma2": ("gemma2", {**_WINDOWED, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**_WINDOWED, "query_pre_attn_scalar": 16}),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "gpt_oss": ("gpt_oss", {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

_ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", _MAMBA),
    "nemotron_h": ("nemotron_h", {**_NEMOTRON, "num_hidden_layers": 4, "hybrid_override_pattern": "M*M-"}),
    "falcon_h1": ("falcon_h1", {**_HYBRID, "mamba_d_ssm": 128, "mamba_chunk_size": 16, "head_dim": 32}),
    "granitemoehybrid": ("granitemoehybrid", _GRANITE),
    "phi": ("phi", {"num_attention_heads": 2, "num_key_value_heads": 2}),
}
"""Architectures that other engines than the embedded one run."""

ARCHS: tuple[str, ...] = tuple(_RECIPES)
"""Architectures that ``build_tiny_model`` knows; ``qwen3_tied`` shares embeddings and head, ``gpt_oss`` has attention sinks."""


def build_tiny_model(
    path: str | Path,
    arch: str = "qwen3",
    dtype: str = "float32",
    seed: int | None = None,
    tied: bool | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a complete tiny checkpoint to the folder ``path`` (made if absent) and return it.

    Args:
        seed: equal seeds give equal weights; None draws a fresh one.
        tied: whether embeddings and output head share their weights; None keeps the architecture's default.
        config_overrides: fields of the architecture's config.
    """
    recipes = {**_RECIPES, **_ELSEWHERE}
    if arch not in recipes:
        raise InvalidInput(f"unknown arch {arch!r}; known: {', '.join(recipes)}", field="arch")
    model_type, fields = recipes[arch]
    overrides = dict(config_overrides)
    if tied is not None:
        overrides["tie_word_embeddings"] = tied
    config = _config(model_type, {**_COMMON, **fields}, overrides)
    config.dtype = dtype_of(dtype)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _save_config(config, folder)
    build_tokenizer().save_pretrained(folder)
    save_file(random_state_dict(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_state_dict(path_or_config: str | Path | Any, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Fresh random weights for a model folder or config: checkpoint names, per-expert tensors, tied weights once."""
    config = _load_config(path_or_config) if isinstance(path_or_config, str | Path) else path_or_config
    generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    shapes = _checkpoint_tensors(config)
    dtype = config.dtype or torch.float32
    return {
        name: _values(name, meta, config, generator).to(dtype if meta.is_floating_point() else meta.dtype)
        for name, meta in shapes.items()
    }


def save_checkpoint(
    folder: str | Path, state_dict: Mapping[str, torch.Tensor], like: str | Path, num_shards: int = 1
) -> Path:
    """Write ``state_dict`` as a checkpoint folder with the config and tokenizer of the model folder ``like``."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for file in Path(like).iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)
    names = list(state_dict)
    if num_shards == 1:
        _save_shard(target / "model.safetensors", names, state_dict)
        return target
    step = math.ceil(len(names) / num_shards)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file_name = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number * step : (number + 1) * step]
        _save_shard(target / file_name, part, state_dict)
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.nbytes for tensor in state_dict.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def _save_shard(file: Path, names: list[str], state_dict: Mapping[str, torch.Tensor]) -> None:
    save_file({name: state_dict[name].detach().contiguous() for name in names}, file, metadata={"format": "pt"})


def _config(model_type: str, fields: dict[str, Any], overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type)
    unknown = [name for name in overrides if name not in fields and not hasattr(known, name)]
    if unknown:
        raise InvalidInput(f"{model_type} configs have no field {unknown[0]!r}", field=unknown[0])
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def _load_config(path: str | Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def _save_config(config: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    config.architectures = [_empty_model(config).__class__.__name__]
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(folder)


def _empty_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _checkpoint_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Checkpoint names with meta tensors of their shapes: tied weights once, fused experts taken apart again."""
    from transformers.core_model_loading import revert_weight_conversion

    model = _empty_model(config)
    tied = set(model.all_tied_weights_keys)
    module_tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, module_tensors)
    return reverted


def _values(name: str, meta: torch.Tensor, config: Any, generator: torch.Generator) -> torch.Tensor:
    """Random float32 values of a scale that keeps activations alive and the head's logits apart."""
    if not meta.is_floating_point():
        return torch.randint(0, 8, meta.shape, generator=generator)
    is_gemma = config.model_type.startswith("gemma")
    if "norm" in name and meta.dim() == 1:
        centre = 0.0 if is_gemma else 1.0  # Gemma's norms scale by 1 + weight
        return centre + torch.rand(meta.shape, generator=generator) - 0.5
    if meta.dim() <= 1:
        return 0.2 * _normal(meta, generator)
    if "embed" in name:
        scale = 0.2 if config.tie_word_embeddings else 1.0  # a large tied embedding would repeat its own token
        return _normal(meta, generator) * (scale / math.sqrt(meta.shape[-1]) if is_gemma else scale)
    gain = 3.0 if name.startswith("lm_head") else 1.5
    return _normal(meta, generator) * (gain / math.sqrt(meta.shape[-1]))


def _normal(meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(meta.shape, generator=generator)
