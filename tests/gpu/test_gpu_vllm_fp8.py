"""Layers that vLLM quantises, on a GPU: processed beside the running engine; tokens and bytes are those of a fresh load, CUDA graphs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_vllm import answers, engine, through_loader, tiny_model

from weightcast import Publisher
from weightcast.errors import RoundFailed
from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.testing.quantised_checkpoints import declare_quantised, quantised

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]

SCHEMES = ["fp8", "fp8_per_channel", "fp8_per_block", "float", "int"]
"""Quantised by vLLM as it loads, and quantised before."""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def receiver_of(llm: Any) -> Any:
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return worker.weight_transfer_engine.calls.engine.receiver


def live_bytes(llm: Any) -> dict[str, torch.Tensor]:
    """All parameters of the engine's model, as bytes."""
    torch.cuda.synchronize()
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return {
        name: value.detach().contiguous().view(-1).view(torch.uint8).cpu()
        for name, value in model.named_parameters()
        if value.numel()
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize(
    ("arch", "scheme"),
    [*(("qwen3", scheme) for scheme in SCHEMES), ("qwen3_moe", "fp8"), ("qwen3_moe", "fp8_per_block")],
)
def test_rounds_equal_fresh_loads(tmp_path: Path, arch: str, scheme: str, mode: str) -> None:
    """Twice in a row with fresh values; a staged round that is taken back leaves what was before it."""
    path = tiny_model(tmp_path / "m", arch)
    values = [random_state_dict(path) for _ in range(3)]
    options = {"quantization": scheme} if scheme.startswith("fp8") else {}
    if not options:
        declare_quantised(path, scheme)
        values = [quantised(weights, scheme) for weights in values]
    folders = [save_checkpoint(tmp_path / f"{number}", weights, like=path) for number, weights in enumerate(values)]
    fresh = []
    for folder in folders[1:]:
        with engine(folder, **options) as llm:
            fresh.append((live_bytes(llm), answers(llm)))
    assert differing(fresh[0][0], fresh[1][0])
    assert fresh[0][1] != fresh[1][1]
    with engine(folders[0], **options) as llm:
        source = {name: value.cuda() for name, value in values[0].items()}
        with Publisher(source, [llm], timeout_s=60, mode=mode) as publisher:

            def check(number: int) -> None:
                assert not differing(live_bytes(llm), fresh[number][0])
                assert answers(llm) == fresh[number][1]

            for number, weights in enumerate(values[1:]):
                for name, value in weights.items():
                    source[name].copy_(value)
                assert publisher.publish().digests_match
                check(number)
            print(f"LOADER {arch} {scheme}: {len(through_loader(llm))} tensors through the loader")
            assert through_loader(llm) == (), "nothing waits for vLLM's reload"
            if mode == "staged":
                receiver_of(llm).rollback(receiver_of(llm)._round.id)
                check(0)
                with pytest.raises(RoundFailed, match="Call publish"):
                    publisher.publish()
                assert publisher.publish().digests_match
                check(1)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_memory_goes_with_the_trainer_and_comes_back_with_the_next(tmp_path: Path, mode: str) -> None:
    """What lies beside the weights, unprocessed and processed, is given back. A second trainer starts anew."""
    path = tiny_model(tmp_path / "m", "qwen3")
    first, second = (random_state_dict(path) for _ in range(2))
    folder = save_checkpoint(tmp_path / "second", second, like=path)
    with engine(folder, quantization="fp8") as llm:
        fresh = (live_bytes(llm), answers(llm))
    with engine(save_checkpoint(tmp_path / "first", first, like=path), quantization="fp8") as llm:
        before = torch.cuda.memory_allocated()
        for weights in (first, second):
            source = {name: value.cuda() for name, value in weights.items()}
            with Publisher(source, [llm], timeout_s=60, mode=mode) as publisher:
                assert publisher.publish().digests_match
            receiver_of(llm).leave()
            del source, publisher
        assert not differing(live_bytes(llm), fresh[0])
        assert answers(llm) == fresh[1]
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + (8 << 20)
