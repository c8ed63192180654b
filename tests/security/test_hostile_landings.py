"""An engine that wants the same thing any number of times: a named error within the deadline, and the others' round goes on."""

from __future__ import annotations

import time

import pytest
import torch
from tests.support.hostile import repeating_landings

from weightcast import Publisher
from weightcast.errors import WeightcastError
from weightcast.layout import most_placements
from weightcast.manifest import Manifest, TensorSpec
from weightcast.testing.local_engine import DictModel, LocalEngine

TIMEOUT_S = 8.0
SHAPES = {f"layers.{number}.weight": (128, 128) for number in range(40)}
MOST = most_placements(
    Manifest.of(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in SHAPES.items())
)


def values() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("count", [MOST, MOST + 1, 200_000], ids=["as many as are taken", "one more", "megabytes"])
@pytest.mark.parametrize("require", ["all", "live"])
def test_landings_without_end_are_one_engines_failure(count: int, require: str) -> None:
    good, hostile = (LocalEngine(name, [DictModel(values())], mode="staged") for name in ("good", "hostile"))
    weights = values()
    with (
        repeating_landings("hostile", count),
        Publisher(weights, [hostile, good], timeout_s=TIMEOUT_S, require=require) as publisher,  # type: ignore[arg-type]
    ):
        for _ in range(2):
            for name, value in values().items():
                weights[name].copy_(value)
            start = time.monotonic()
            if require == "all":
                with pytest.raises(WeightcastError, match="hostile"):
                    publisher.publish()
                assert good.workers[0].weight_version == "default"
            else:
                report = publisher.publish()
                assert {engine.name: engine.ok for engine in report.engines}["good"]
                assert good.models[0].holds(weights)
            assert time.monotonic() - start < TIMEOUT_S + 2
