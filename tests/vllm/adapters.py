"""What tests of adapters publish to vLLM, what merged weights answer, and what lies in vLLM's own LoRA manager."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 17, 33, 2, 90], [44, 45, 46], [7]]
LENGTH = 24
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "dtype": "float32"}


def trainer_of(model: Path, name: str = "policy", **options: Any) -> Any:
    """A PEFT model over the engine's own base weights, its adapter with fresh values."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    usual = {"r": 8, "lora_alpha": 11, "target_modules": "all-linear"}
    made = get_peft_model(base, LoraConfig(**{**usual, **options}), adapter_name=name)
    scatter(made)
    return made


@torch.no_grad()
def rebase(trainer: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give the trainer's base model other weights, by the names of a checkpoint."""
    for name, value in trainer.named_parameters():
        if "lora_" not in name:
            value.copy_(weights[name.removeprefix("base_model.model.").replace(".base_layer.", ".")])


@torch.no_grad()
def scatter(trainer: Any) -> None:
    """Fresh values for the adapter, in place."""
    for name, value in trainer.named_parameters():
        if "lora_" in name:
            value.copy_(torch.randn(value.shape) * 0.3)


def greedy(trainer: Any, ids: list[int], length: int = LENGTH) -> list[int]:
    """What the trainer's own merged weights answer."""
    return greedy_on(copy.deepcopy(trainer).merge_and_unload(), ids, length)


@torch.no_grad()
def greedy_on(model: Any, ids: list[int], length: int = LENGTH) -> list[int]:
    tokens = list(ids)
    for _ in range(length):
        tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def base_tokens(trainer: Any, ids: list[int], length: int = LENGTH) -> list[int]:
    """What the trainer's base model answers."""
    with trainer.disable_adapter():
        return greedy_on(trainer, ids, length)


def asked(name: str) -> Any:
    """A request for an adapter by its name, or by a version's."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1, f"weightcast://{name}")


def params(length: int = LENGTH) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)


class Stepped:
    """Requests of an LLM that are computed step by step, so that rounds come between two steps."""

    def __init__(self, llm: Any) -> None:
        self._engine, self.done = llm.llm_engine, dict[str, Any]()
        self.num_tokens = dict[str, int]()

    def add(self, name: str, ids: list[int], adapter: str | None) -> None:
        lora = None if adapter is None else asked(adapter)
        self._engine.add_request(name, {"prompt_token_ids": ids}, params(), lora_request=lora)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for output in self._engine.step():
                self.num_tokens[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished:
                    self.done[output.request_id] = output

    def finish(self) -> None:
        while self._engine.has_unfinished_requests():
            self.step()

    def tokens(self, name: str) -> list[int]:
        return list(self.done[name].outputs[0].token_ids)

    def label(self, name: str) -> str:
        return str(self.done[name].lora_request.lora_name)


def tokens_of(llm: Any, ids: list[int], adapter: str | None = "policy") -> list[int]:
    lora = None if adapter is None else asked(adapter)
    (output,) = llm.generate([{"prompt_token_ids": ids}], params(), use_tqdm=False, lora_request=lora)
    return list(output.outputs[0].token_ids)


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def stacks(llm: Any, number: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module as vLLM's steps read them, found without weightcast."""
    models = worker_of(llm).model_runner.lora_manager._adapter_manager
    slot = models.lora_index_to_id.index(number)
    found = {}
    for name, layer in models.modules.items():
        for part, a, b in zip(
            models.packed_modules.get(name, [name]), layer.lora_a_stacked, layer.lora_b_stacked, strict=False
        ):
            if a.dim() == 4:
                found[part] = (a[slot, 0], b[slot, 0])
    return found


def assert_live(llm: Any, trainer: Any, number: int) -> None:
    """The matrices of a version in vLLM, byte for byte those of the trainer; vLLM keeps B scaled."""
    found = stacks(llm, number)
    count = 0
    for name, layer in trainer.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and "policy" in layer.lora_A:
            a, b = layer.lora_A["policy"].weight.detach(), layer.lora_B["policy"].weight.detach()
            scaled = b * layer.scaling["policy"]
            stacked_a, stacked_b = found[name]
            assert torch.equal(stacked_a[: a.shape[0]].view(torch.int32), a.view(torch.int32)), name
            assert torch.equal(stacked_b[:, : b.shape[1]].contiguous().view(torch.int32), scaled.view(torch.int32)), (
                name
            )
            assert not stacked_a[a.shape[0] :].any()
            count += 1
    assert count == 14
