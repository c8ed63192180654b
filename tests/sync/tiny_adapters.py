"""Tiny models with adapters of PEFT, fresh values for them, and what PEFT itself makes of a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from tiny_modules import ARCHS, COMMON
from torch import nn

from weightcast.sources import Source

MODELS: dict[str, dict[str, Any]] = {**ARCHS, "qwen3": {"head_dim": 8}, "qwen3_tied": {"head_dim": 8}}
LINEAR = ["q_proj", "v_proj", "down_proj"]


def base(arch: str = "qwen3", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if arch == "gpt2":
        config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        tied = {"tie_word_embeddings": arch.endswith("_tied")}
        config = AutoConfig.for_model(arch.removesuffix("_tied"), **{**COMMON, **MODELS[arch], **tied})
    return AutoModelForCausalLM.from_config(config).to(dtype)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": LINEAR, **options})


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Fresh random values for everything that floats, as an optimizer would leave them in place."""
    for value in dict.fromkeys([*model.parameters(), *model.buffers()]):
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape) / 3)


def merged(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT itself makes of a copy, under the names that a checkpoint has, tied ones under each."""
    whole = copy.deepcopy(model).merge_and_unload()
    return {name: value.detach().clone() for name, value in whole.state_dict().items()}


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One real step on random tokens."""
    tokens = torch.randint(64, (2, 8))
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def published(source: Source) -> dict[str, torch.Tensor]:
    """What a source has in its memory, tensor by tensor."""
    memory = source.memory
    return {
        p.region.name: memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides).clone()
        for p in source.layout.placements
    }


def assert_same(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    different = [name for name, value in truth.items() if not torch.equal(found[name], value)]
    assert not different
