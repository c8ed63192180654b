"""Checkpoints whose linear layers are quantised already, as llm-compressor writes them: values, and a scale for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

NUMBERS = {"float": (torch.float8_e4m3fn, 448.0), "int": (torch.int8, 127.0)}


def declare_quantised(model: Path, kind: str, *, symmetric: bool = True) -> Path:
    """Have a model folder's config say that its checkpoint is quantised by rows, and activations by tokens. ``kind``: float or int.
    ``symmetric`` is said of activations."""
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True, "symmetric": symmetric},
    }
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


def quantised(weights: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The checkpoint that ``declare_quantised`` describes, of plain weights."""
    dtype, largest = NUMBERS[kind]
    found = {}
    for name, value in weights.items():
        if not name.endswith("_proj.weight"):
            found[name] = value
            continue
        scale = value.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / largest
        scaled = value.float() / scale
        found[name] = (scaled if dtype.is_floating_point else scaled.round()).to(dtype)
        found[f"{name}_scale"] = scale
    return found
