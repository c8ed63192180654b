"""LoRA adapters of the embedded engine on a GPU: versions side by side in one batch, each with the bytes and tokens that it has to have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.testing.models import build_tiny_model

pytest.importorskip("triton", reason="needs a CUDA build of torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
DEVICE = "cuda"
NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


@torch.no_grad()
def scatter(model: Any) -> None:
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.copy_(torch.randn(value.shape, device=value.device) * 0.3)


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    merged, tokens = copy.deepcopy(model).merge_and_unload().eval(), list(ids)
    for _ in range(NUM_TOKENS):
        tokens.append(int(merged(torch.tensor([tokens], device=DEVICE)).logits[0, -1].argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_versions_side_by_side_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "m", "qwen3", dtype)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
    trainer = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules="all-linear"), adapter_name="policy")
    llm = LLM(folder, dtype=dtype, device=DEVICE)
    prompts = [torch.randint(3, 300, (length,)).tolist() for length in (5, 11, 2)]
    try:
        with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
            scatter(trainer)
            publisher.publish()
            for _ in range(3):
                truth = [greedy(trainer, prompts[0])]
                llm.pause_generation("keep", clear_cache=False)
                found: list[Any] = []
                requests = [llm.engine.request(prompts[0], GREEDY, found.append, stream=False, adapter="policy")]
                llm.engine.submit(requests).result(30)
                scatter(trainer)
                report = publisher.publish()
                assert report.digests_match
                truth.append(greedy(trainer, prompts[1]))
                more = llm.engine.request(prompts[1], GREEDY, found.append, stream=False, adapter="policy")
                requests.append(more)
                llm.engine.submit([more]).result(30)
                llm.resume_generation()
                llm.generate(prompts[2], SamplingParams(max_tokens=2 * NUM_TOKENS, temperature=0, ignore_eos=True))
                tokens = {output.request_id: output.outputs[0].token_ids for output in found}
                assert [tokens[request.request_id] for request in requests] == truth
                version = llm.engine.core.adapters.find("policy")
                live = {f"{m}.lora_{f}": v for m, (a, b, _) in version.modules.items() for f, v in (("A", a), ("B", b))}
                for name, value in trainer.named_parameters():
                    if "lora_" in name:
                        plain = name.partition("base_model.model.")[2].removesuffix(".policy.weight")
                        assert live[plain].is_cuda == (DEVICE == "cuda")
                        assert torch.equal(live[plain], value), name
    finally:
        llm.shutdown()
