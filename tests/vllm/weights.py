"""What tests publish. A Publisher goes on with the same tensors: they get other values in place."""

from collections.abc import Mapping
from pathlib import Path

import torch

from weightcast.testing.models import random_state_dict


def fill(weights: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Other values for all of them."""
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(values[name])


def replace(weights: dict[str, torch.Tensor], model: Path) -> None:
    """Fresh random values for all of them."""
    fill(weights, random_state_dict(model))
