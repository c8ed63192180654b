"""vLLM's own factory of trainers, its own source of weights, and its HTTP client's place, with weightcast between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.offline import PROMPTS, FreshLoads

from weightcast.errors import InvalidInput
from weightcast.testing.models import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("factory") / "m", "qwen3", dtype="bfloat16", head_dim=32)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_module_source_reaches_an_engine_window_by_window(
    model: Path, fresh: FreshLoads, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from weightcast.integrations.vllm import WeightcastTrainerInfo

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with offline.engine(model) as llm:
        info = WeightcastTrainerInfo(
            rank=0, engines=[llm], window_nbytes=2**16, options={"mode": mode, "timeout_s": 60, "transport": "shm"}
        )
        trainer: Any = WeightTransferTrainerFactory.trainer_init(info, client=None, source=ModuleSource(policy))
        try:
            for _ in range(2):
                with torch.no_grad():
                    for value in policy.parameters():
                        value.add_(torch.randn_like(value) * 0.05)
                report = trainer.send_weights()
                assert report.digests_match
                assert report.mode == mode
                assert llm.get_weight_version() == report.version
                weights = {name: value.detach() for name, value in policy.named_parameters()}
                got = [offline.answers(llm, [ids])[0] for ids in PROMPTS]
                assert got == fresh.answers(model, weights, PROMPTS)
        finally:
            trainer.shutdown()


def test_what_cannot_be_told_is_refused() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from weightcast.integrations.vllm import WeightcastTrainerInfo

    source = [("w", torch.zeros(3))]
    with pytest.raises(InvalidInput, match="none was given"):
        WeightTransferTrainerFactory.trainer_init(WeightcastTrainerInfo(rank=0), client=None)
    with pytest.raises(InvalidInput, match="does not say which engines"):
        WeightTransferTrainerFactory.trainer_init(WeightcastTrainerInfo(rank=0), client=object(), source=source)
    with pytest.raises(InvalidInput, match="process_group="):
        WeightTransferTrainerFactory.trainer_init(WeightcastTrainerInfo(rank=1), client=None, source=source)
