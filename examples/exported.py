"""A trainer whose parameters have names and shapes of its own, as torchtitan's and Megatron's do, and an adapter that exports checkpoints.

    python examples/exported.py [--steps 8]

The trainer keeps queries, keys and values as one weight, and so the gate and the up projection. ``Adapter.to_hf`` cuts them, one tensor after the
other, while the Publisher reads the stream. With torchtitan the line is StreamSource(lambda: adapter.to_hf(model.state_dict()).items()).
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from policy import NUM_TOKENS, PROMPTS, Learner, build
from torch import nn
from torch.func import functional_call

from weightcast import Publisher, StreamSource
from weightcast.engines.embedded import LLM, SamplingParams

FUSED = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w13": ("mlp.gate_proj", "mlp.up_proj"),
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class Adapter:
    """Knows both forms of a model. ``rows`` has how many rows each part of a fused weight has, by the checkpoint's names."""

    def __init__(self, checkpoint: Mapping[str, torch.Tensor]) -> None:
        self._rows = {name: value.shape[0] for name, value in checkpoint.items()}

    def from_hf(self, checkpoint: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trainer's tensors."""
        found, parts = {}, {part: fused for fused, parts in FUSED.items() for part in parts}
        for name, value in checkpoint.items():
            layer = LAYER.fullmatch(name)
            if layer is None or layer[2] not in parts:
                found[name.replace("model.layers.", "layers.")] = value
                continue
            fused = f"layers.{layer[1]}.{parts[layer[2]]}.weight"
            if fused not in found:
                names = [f"model.layers.{layer[1]}.{part}.weight" for part in FUSED[parts[layer[2]]]]
                found[fused] = torch.cat([checkpoint[each] for each in names])
        return found

    def to_hf(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, one after the other."""
        for name, value in tensors.items():
            prefix, _, rest = name.partition(".")
            number, _, own = rest.partition(".")
            parts = FUSED.get(own.removesuffix(".weight"), ()) if prefix == "layers" else ()
            names = [f"model.layers.{number}.{part}.weight" for part in parts]
            if names:
                yield from zip(names, value.split([self._rows[each] for each in names]), strict=True)
            else:
                yield f"model.{name}" if prefix == "layers" else name, value


class Trainer(Learner):
    """Trains the tensors of its own form; the model of the checkpoint's form computes with them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        checkpoint, inner = self.model.state_dict(), self.model
        self.adapter = Adapter(checkpoint)
        self.parameters = {
            name: nn.Parameter(value.clone()) for name, value in self.adapter.from_hf(checkpoint).items()
        }
        self._optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2)
        self.model = lambda **given: functional_call(inner, dict(self.adapter.to_hf(self.parameters)), (), given)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder))
        llm, trainer = LLM(str(path)), Trainer(path)
        rewards = []
        with Publisher(StreamSource(lambda: trainer.adapter.to_hf(trainer.state_dict())), [llm]) as publisher:
            for _ in range(options.steps):
                report = publisher.publish()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                rewards.append(trainer.step(PROMPTS, [list(output.outputs[0].token_ids) for output in outputs]))
                print(f"{report.version}: reward {rewards[-1]:.2f}")
        llm.shutdown()
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")


if __name__ == "__main__":
    main()
