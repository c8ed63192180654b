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


def test_nothing_is_digested_for_workers_that_left() -> None:
    tensors = {"w": torch.randn(12, 5), "b": torch.randn(7)}
    stays = LocalEngine("a", [DictModel(tensors, rows=(i, 2)) for i in range(2)])
    with Publisher(tensors, [stays], timeout_s=20) as publisher:
        publisher.publish()
        expected = set(publisher._part.expected)
        for size in (3, 4):
            leaves = LocalEngine("b", [DictModel(tensors, rows=(i, size)) for i in range(size)])
            publisher.add(leaves)
            assert len(publisher._part.expected) == len(expected) + size
            comes_again = LocalEngine("b", [DictModel(tensors, rows=(i, 6)) for i in range(6)])
            leaves.stop()
            leaves.models, leaves.workers = comes_again.models, comes_again.workers
            tensors["w"].normal_()
            assert publisher.publish().digests_match
            assert all(model.holds(tensors) for engine in (stays, leaves) for model in engine.models)
            assert len(publisher._part.expected) == len(expected) + 6
            publisher.remove("b")
            assert set(publisher._part.expected) == expected
        assert publisher.publish().digests_match
