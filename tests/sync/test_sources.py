"""What a Publisher is given: what it cannot do is refused, not ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightcast import Publisher
from weightcast.errors import InvalidInput
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.sources import SafetensorsSource, StateDictSource, make_source

WEIGHTS = {"w": torch.randn(4, 5)}


def test_a_dtype_that_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    for source in (tmp_path, str(tmp_path), SafetensorsSource(tmp_path), StateDictSource(WEIGHTS)):
        make_source(source)
        with pytest.raises(InvalidInput, match="no effect") as caught:
            make_source(source, dtype=torch.bfloat16)
        assert caught.value.field == "dtype"
    assert make_source(WEIGHTS, dtype=torch.bfloat16).manifest["w"].dtype == "bfloat16"


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf")])
def test_no_time_is_not_the_default_time(timeout_s: float) -> None:
    engine = LocalEngine("local", [DictModel({"w": torch.zeros(4, 5)})])
    with Publisher(WEIGHTS, [engine], timeout_s=20) as publisher:
        for call in (publisher.connect, publisher.publish, lambda **time: publisher.add(engine, **time)):
            with pytest.raises(InvalidInput) as caught:
                call(timeout_s=timeout_s)
            assert caught.value.field == "timeout_s"
        assert publisher.publish().digests_match
    engine.stop()
