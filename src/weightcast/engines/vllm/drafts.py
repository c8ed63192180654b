"""Drafts: the model that a worker speculates with, and both models as one that a manifest fills.

A draft with a checkpoint of its own (a draft model, an EAGLE head) is published under names that begin with ``draft.``. The tensors of an
MTP block have the names that they have in the target's checkpoint: what the target's loader has no use for is the draft's. Embeddings and
heads that vLLM has the draft share by reference are the target's, and are loaded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from weightcast.errors import PlanMismatch, Unsupported
from weightcast.manifest import Manifest

PART = "draft"
PREFIX = "draft."
NOT_IN_CHECKPOINT = "the engine speculates with a model, and the checkpoint has no tensor of that draft"

METHODS = frozenset({"draft_model", "eagle", "eagle3", "mtp"})
"""Methods of speculation with a model that is published."""


class Draft(NamedTuple):
    """The model that a worker speculates with."""

    model: nn.Module
    method: str
    model_config: Any
    is_of_same_checkpoint: bool
    """Whether the draft's tensors have the names that the target's checkpoint gives them, as those of an MTP block have."""


def draft_of(worker: Any) -> Draft | None:
    """Return the draft of a vLLM worker; None where the worker speculates without a model, or not at all. Raises Unsupported where the
    draft is of another type than its target."""
    speculation = getattr(worker.vllm_config, "speculative_config", None)
    if speculation is None or speculation.method not in METHODS:
        return None
    model = worker.get_draft_model()
    if model is None:
        return None
    config, of_target = speculation.draft_model_config, worker.vllm_config.model_config
    if config.dtype != of_target.dtype:
        raise Unsupported(
            f"a draft in {config.dtype} beside a model in {of_target.dtype}",
            hint="Have vLLM load both in the type of the target (--dtype)",
        )
    is_inside = speculation.method == "mtp" and config.model == of_target.model
    return Draft(model, speculation.method, config, is_inside)


class WithDraft(nn.Module):
    """A model and its draft, as one model with one loader. The model's parts have the names that they have without a draft, and
    the draft's names begin with ``draft.``. Neither model is changed."""

    def __init__(self, model: nn.Module, draft: Draft, unclaimed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._modules.update(model._modules)
        self._modules[PART] = draft.model
        self._both = (model, draft)
        self.unclaimed = unclaimed
        """Names without a prefix that the target's loader has no use for."""

    @property
    def target(self) -> nn.Module:
        """The model that the draft proposes tokens for."""
        return self._both[0]

    @property
    def draft(self) -> Draft:
        """The draft."""
        return self._both[1]

    def is_of_draft(self, name: str) -> bool:
        """Whether the draft's loader takes the tensor of this name."""
        return name.startswith(PREFIX) or name in self.unclaimed

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Have each of the two loaders take its tensors, in the order in which they come."""
        for is_of_draft, some in groupby(tensors, key=lambda item: self.is_of_draft(item[0])):
            loader: Any = self.draft.model if is_of_draft else self.target
            loader.load_weights((name.removeprefix(PREFIX), tensor) for name, tensor in some)

    def shared(self) -> Iterator[tuple[str, str]]:
        """Yield the parts of the draft that are parts of the target: the name in the draft, and in the target."""
        of_target = {id(part): name for name, part in self.target.named_modules() if name}
        for name, part in self.draft.model.named_modules(remove_duplicate=False):
            if name and id(part) in of_target and id(self.draft.model.get_submodule(_parent(name))) not in of_target:
                yield name, of_target[id(part)]


def share_as(whole: WithDraft, target: nn.Module, draft: nn.Module) -> None:
    """Have a draft share with a target the parts that another draft shares with its target."""
    for name, of_target in whole.shared():
        setattr(draft.get_submodule(_parent(name)), name.rpartition(".")[2], target.get_submodule(of_target))


def check_published(whole: WithDraft, manifest: Manifest) -> None:
    """Raise PlanMismatch where a manifest has nothing for the draft: a draft that silently keeps its weights is accepted less with each
    round."""
    if any(whole.is_of_draft(spec.name) for spec in manifest.tensors):
        return
    where = (
        "Publish its tensors as well, under the names that the model's checkpoint gives them"
        if whole.draft.is_of_same_checkpoint
        else 'Publish it as well: Publisher({"": model, "draft.": draft}, ...)'
    )
    raise PlanMismatch(
        f"the engine speculates with a model ({whole.draft.method}), and none of the published tensors is that draft's",
        hint=f'{where}\nWhere the draft is to keep its weights, say so: keep=["{PART}"]',
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
