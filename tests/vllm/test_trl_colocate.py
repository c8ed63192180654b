"""TRL's colocate mode on a CPU: TRL's own engine in the trainer's process, which weightcast publishes to. Nothing sleeps without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.offline import PROMPTS, FreshLoads

from weightcast.testing.models import build_tiny_model

trl = pytest.importorskip("trl", reason="TRL is not installed beside vLLM")
STEPS = 2


def even(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in answer) / len(answer) for answer in completion_ids]


def test_colocate(tmp_path: Path, fresh: FreshLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation import vllm_generation

    from weightcast.integrations.trl import use_in_colocate_mode

    folder = build_tiny_model(tmp_path / "m", "qwen3", dtype="float32", head_dim=32)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", vllm_generation.VLLMGeneration.sync_weights)
    small = {"kv_cache_memory_bytes": 32 << 20, "enforce_eager": True, "dtype": "float32"}
    own = vllm_generation.LLM
    monkeypatch.setattr(vllm_generation, "LLM", lambda **given: own(**{**given, **small}))
    use_in_colocate_mode()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = InMemoryTable(pyarrow.table({"prompt": [tokenizer.decode(ids) for ids in PROMPTS]}))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=tokenizer,
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=8,
            max_steps=STEPS,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256,
        ),
        reward_funcs=even,
        train_dataset=Dataset(prompts, fingerprint="prompts"),
    )
    trainer.train()
    generation = trainer.vllm_generation
    report = generation.sync_weights()
    assert report.digests_match
    assert report.mode == "in_place"
    assert report.version.startswith(f"{STEPS + 1}-")
    weights = {name: value.detach() for name, value in trainer.model.named_parameters()}
    got = [offline.answers(generation.llm, [ids])[0] for ids in PROMPTS]
    assert got == fresh.answers(folder, weights, PROMPTS, dtype="float32")
    ratios = [entry for entry in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in entry]
    assert [entry["sampling/importance_sampling_ratio/mean"] for entry in ratios] == pytest.approx(
        [1.0] * STEPS, abs=1e-2
    )
