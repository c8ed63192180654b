"""TRL's colocate mode around a stock vLLM engine that really sleeps. A class with TRL's sequence of calls stands in for TRL's own, which
tests/frameworks and tests/vllm run on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from card import TOLERANCE, change, in_use, large_model, module_of
from gpu_vllm import answers, engine

from weightcast.testing.models import save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


class VLLMGeneration:
    """What TRL 1.16 does with a colocated engine: asleep from the start, and again behind each generation."""

    mode, tensor_parallel_size, enable_sleep_mode = "colocate", 1, True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.llm = sys.modules["trl.generation.vllm_generation"].LLM(enable_sleep_mode=True)
        self.llm.sleep(level=2)
        self._llm_weights_sleeping = True

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.data

    def sync_weights(self) -> None:
        raise AssertionError("replaced")

    def generate(self) -> list[list[int]]:
        if self._llm_weights_sleeping:
            self.sync_weights()
        self.llm.wake_up(tags=["kv_cache"])
        found = answers(self.llm)
        self.llm.sleep(level=2)
        self._llm_weights_sleeping = True
        return found


def test_colocated_with_an_engine_that_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.integrations.trl import use_in_colocate_mode

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    large = large_model(tmp_path / "m")
    got, sets = [], []
    with engine(large, enable_sleep_mode=True) as llm:
        trl = ModuleType("trl.generation.vllm_generation")
        trl.VLLMGeneration, trl.empty_cache = VLLMGeneration, torch.cuda.empty_cache  # type: ignore[attr-defined]
        trl.LLM = lambda weight_transfer_config, enable_sleep_mode: llm  # type: ignore[attr-defined]
        for name in ("trl", "trl.generation"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, trl.__name__, trl)
        monkeypatch.setattr(VLLMGeneration, "sync_weights", VLLMGeneration.sync_weights)
        use_in_colocate_mode(timeout_s=100)
        module, nbytes = module_of(large)
        generation: Any = VLLMGeneration(module)
        asleep = in_use()
        for _ in range(3):
            sets.append(change(module))
            report = generation.sync_weights()
            assert (report.digests_match, report.mode) == (True, "in_place")
            (outcome,) = llm.collective_rpc("weightcast_call", args=("status", {}))
            assert "weights" not in outcome["asleep"]
            assert "kv_cache" in outcome["asleep"]
            got.append(generation.generate())
            torch.cuda.empty_cache()
            window = min(nbytes, 2**30)
            assert in_use() - asleep < window + 2 * TOLERANCE, "more than the stream's windows stays in its sleep"
        assert generation.generate() == got[-1], "without a step in between the same weights come back"
        assert len({str(each) for each in got}) == 3
        del module, generation
    for number, values in enumerate(sets):
        path = save_checkpoint(tmp_path / f"fresh-{number}", values, like=large)
        with engine(path) as fresh:
            assert answers(fresh) == got[number]
