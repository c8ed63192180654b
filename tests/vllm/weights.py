"""What tests publish. A Publisher goes on with the same tensors: they get other values in place."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.support.verified import comparison

from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.testing.vllm_server import Served
from weightcast.trainer.comparison import Comparison


def fill(weights: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Other values for all of them."""
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(values[name])


def replace(weights: dict[str, torch.Tensor], model: Path) -> None:
    """Fresh random values for all of them."""
    fill(weights, random_state_dict(model))


def verified(served: Served, model: Path, weights: Mapping[str, torch.Tensor]) -> Comparison:
    """What ``weightcast verify`` finds when the weights are a checkpoint."""
    checkpoint = save_checkpoint(model.parent / f"verified-{time.monotonic_ns()}", weights, like=model)
    return comparison(served.url, served.token, checkpoint)
