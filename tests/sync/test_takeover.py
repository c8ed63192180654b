"""Takeover is for the first join: a trainer that was replaced does not take its engines back when it wakes up."""

from __future__ import annotations

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import RoundFailed, StateError
from weightcast.testing.local_engine import DictModel, LocalEngine


def fresh() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(33, 7), "b": torch.randn(300)}


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_trainer_that_was_replaced_does_not_take_its_engines_back(mode: str) -> None:
    model = DictModel(fresh())
    engine = LocalEngine("llm", [model], mode=mode)
    former, successor = fresh(), fresh()
    with Publisher(former, [engine], timeout_s=10, takeover=True) as first:
        first.publish()
        with Publisher(successor, [engine], timeout_s=10, takeover=True) as second:
            second.publish()
            for _ in range(2):
                with pytest.raises(RoundFailed) as caught:
                    first.publish()
                cause = caught.value.causes["llm"]
                assert isinstance(cause, StateError), cause
                assert "another trainer" in str(cause)
                assert model.holds(successor)
                for tensor in successor.values():
                    tensor.copy_(torch.randn(tensor.shape))
                second.publish()
                assert model.holds(successor)
        first.publish()
        assert model.holds(former), "once the successor has closed it, it is free"
