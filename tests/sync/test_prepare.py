"""prepare() of a trainer on a CPU, which has nothing to queue."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.errors import StateError
from weightcast.testing.local_engine import DictModel, LocalEngine


def test_prepare_may_be_called_at_any_time_while_the_publisher_is_open() -> None:
    module = nn.Linear(5, 3)
    model = DictModel({name: torch.randn_like(value) for name, value in module.state_dict().items()})
    engine = LocalEngine("a", [model])
    try:
        with Publisher(module, [engine], timeout_s=20) as publisher:
            publisher.prepare()
            for _ in range(3):
                with torch.no_grad():
                    for value in module.parameters():
                        value.copy_(torch.randn(value.shape))
                publisher.prepare()
                assert publisher.publish().digests_match
                assert model.holds(module.state_dict())
        with pytest.raises(StateError, match="closed"):
            publisher.prepare()
    finally:
        engine.stop()
