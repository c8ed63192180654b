"""Publishing a stream: a policy that is trained by low-rank adapters, whose merged weights exist one tensor at a time.

    python examples/streams.py [--steps 12]

The base weights are frozen. What the engine serves is W + B A of each layer, which the trainer computes tensor by tensor while the
Publisher reads the stream, and never holds as a whole.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from policy import NUM_TOKENS, PROMPTS, Learner, build
from torch import nn
from torch.nn.utils import parametrize

from weightcast import Publisher, StreamSource
from weightcast.engines.embedded import LLM, SamplingParams

RANK = 16
WINDOW_NBYTES = 2**18


class LowRank(nn.Module):
    """Adds B A to a weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


class AdapterLearner(Learner):
    """Trains adapters of all linear layers, and nothing else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model.requires_grad_(False)
        for module in list(self.model.modules()):
            if isinstance(module, nn.Linear):
                parametrize.register_parametrization(module, "weight", LowRank(module.weight))
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=2e-2)


def merged(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its checkpoint name; a merged one is freed when the iterator goes on."""
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if ".parametrizations" in prefix:
                continue
            names = [name for name, _ in module.named_parameters(recurse=False)]
            if parametrize.is_parametrized(module):
                names += list(module.parametrizations)
            for name in names:
                yield f"{prefix}.{name}", getattr(module, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder))
        llm, learner = LLM(str(path)), AdapterLearner(path)
        stream = StreamSource(lambda: merged(learner.model), window_nbytes=WINDOW_NBYTES)
        rewards = []
        with Publisher(stream, [llm]) as publisher:
            for _ in range(options.steps):
                report = publisher.publish()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                rewards.append(learner.step(PROMPTS, [list(output.outputs[0].token_ids) for output in outputs]))
                print(f"{report.version}: reward {rewards[-1]:.2f}, {report.nbytes} bytes in {report.total_s:.3f} s")
        llm.shutdown()
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")


if __name__ == "__main__":
    main()
