"""DeepSpeed's ZeRO-3 on two ranks: published layer by layer, as the error of the module itself says."""

from __future__ import annotations

from pathlib import Path

from tests.frameworks.served import Served
from tests.frameworks.zero_ranks import train

from weightcast.testing.ranks import run_ranks

ROUNDS = 3


def test_zero_3_is_published_layer_by_layer(served: Served, tmp_path: Path) -> None:
    served.versions.clear()
    losses, others = run_ranks(train, 2, served, str(tmp_path / "store"), ROUNDS, timeout_s=300)
    assert losses == others
    assert losses[-1] < losses[0]
