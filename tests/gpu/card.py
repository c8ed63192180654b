"""The memory of the cards, and a model large enough for a copy of its weights to be seen there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_vllm import DIMENSIONS

from weightcast.testing.models import build_tiny_model

TOLERANCE = 50 << 20
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
RETURNED_WITHIN_S = 20.0
"""What a process held is back some time after the process has gone."""


def large_model(folder: Path) -> Path:
    """About 500 MB in bf16: a copy of it that stayed would be seen."""
    return build_tiny_model(folder, "qwen3", "bfloat16", **{**DIMENSIONS, **SIZES})


def module_of(path: Path) -> tuple[Any, int]:
    """The model on the GPU, and its bytes."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda()
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    assert nbytes > 4 * TOLERANCE
    return module, nbytes


@torch.no_grad()
def change(module: Any) -> dict[str, torch.Tensor]:
    """Fresh values, and a copy of them on the host."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * 0.02)
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def in_use(card: int = 0) -> int:
    """Bytes in use on the card, by all processes."""
    free, total = torch.cuda.mem_get_info(card)
    return total - free


def until_in_use_is_below(*nbytes: int, cards: Sequence[int] = (0,)) -> None:
    """Wait until each card has less in use than its number says, beside what torch keeps in this process."""
    end = time.monotonic() + RETURNED_WITHIN_S
    while True:
        torch.cuda.empty_cache()
        too_many = [in_use(card) - most for card, most in zip(cards, nbytes, strict=True)]
        if all(more < 0 for more in too_many):
            return
        assert time.monotonic() < end, f"{too_many} bytes too many stay in use"
        time.sleep(0.05)
