"""Rounds that send what changed, from and to the memory of a GPU: every live byte is the trainer's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.testing.local_engine import DictModel, LocalEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")

SHAPES = {"embed": ((5000, 513), "bfloat16"), "deep": ((2000, 1024), "float32"), "tiny": ((7,), "float16")}


def policy(device: str) -> nn.ParameterDict:
    return nn.ParameterDict(
        {
            name: nn.Parameter((torch.randn(shape, device=device) * 0.02).to(getattr(torch, dtype)))
            for name, (shape, dtype) in SHAPES.items()
        }
    )


@torch.no_grad()
def step(module: nn.Module) -> None:
    for value in module.parameters():
        where = torch.rand(value.shape, device=value.device) < 0.02
        value[where] *= 1 + torch.randn(int(where.sum()), device=value.device).to(value.dtype) * 0.01


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    ("trainer", "worker", "options", "settings"),
    [
        ("cuda", "cuda", {}, {}),
        ("cuda", "cuda", {"relocatable": False}, {"shadows": 2}),
        ("cuda", "cuda", {"relocatable": False}, {"mode": "in_place"}),
        ("cuda", "cpu", {}, {}),
        ("cpu", "cuda", {"relocatable": False}, {}),
    ],
)
def test_rounds_of_changes_bring_every_byte(
    trainer: str, worker: str, options: dict[str, bool], settings: dict[str, object]
) -> None:
    module = policy(trainer)
    settings = {"mode": "staged", **settings}
    start = {name: torch.zeros_like(value) for name, value in module.items()}
    model = DictModel(start, device=worker, **options)  # type: ignore[arg-type]
    engine = LocalEngine("local", [model], mode=str(settings["mode"]))
    with Publisher(module, [engine], transport="tcp", delta=True, timeout_s=60, **settings) as publisher:  # type: ignore[arg-type]
        for number in range(5):
            report = publisher.publish()
            assert report.digests_match
            (told,) = report.engines[0].workers
            assert told.codec == ("delta" if number else "dense")
            assert contents(model.parameters()) == contents(dict(module.items()))
            step(module)
    engine.stop()
