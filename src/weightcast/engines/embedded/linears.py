"""Which layers of a model can have adapters: linear ones that see each token of a step once, in the order of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Linears:
    """The linear layers of a model by name. ``others`` sees other rows than the tokens of a step, such as those of one expert."""

    able: dict[str, nn.Module] = field(default_factory=dict)
    others: frozenset[str] = frozenset()


def shape_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer. GPT-2's has its weight the other way round."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


@contextmanager
def watched(model: nn.Module) -> Iterator[Linears]:
    """While inside, passes of the model show which linear layers see all of a pass's tokens, once; known afterwards."""
    candidates = {name: part for name, part in model.named_modules() if _is_linear(part)}
    counts = dict.fromkeys(candidates, 0)
    wrong: set[str] = set()
    state = {"tokens": 0, "passes": 0}

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state["tokens"] = kwargs["input_ids"].numel()
        state["passes"] += 1

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counts[name] += 1
            if args[0].shape[:-1].numel() != state["tokens"]:
                wrong.add(name)

        return hook

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [part.register_forward_pre_hook(see(name)) for name, part in candidates.items()]
    found = Linears()
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.able = {
        name: part for name, part in candidates.items() if name not in wrong and counts[name] == state["passes"]
    }
    found.others = frozenset(candidates.keys() - found.able.keys())


def _is_linear(part: nn.Module) -> bool:
    if isinstance(part, nn.Linear):
        return True
    return type(part).__name__ == "Conv1D" and type(part).__module__ == "transformers.pytorch_utils"
