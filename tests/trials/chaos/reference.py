"""Reference: which weights every version had, and whether a token is what they say; transformers' own forward, in float64."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from weightcast.content.expected import ExpectedDigest
from weightcast.content.layout_digest import digest_tensor
from weightcast.digest.versions import version_name
from weightcast.layout import image_layout
from weightcast.plan import compile_plan
from weightcast.sources import make_source
from weightcast.testing.models import random_state_dict

KEPT = 6
TOLERANCE = 1e-6
"""Logits may lie so close that the order of a sum decides; in float64 that is less than this."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: which tokens, and [start, end) of them by version."""

    server: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    spans: tuple[tuple[str, int, int], ...]


class Reference:
    """Knows every version by the seed of its weights. Thread-safe: one lock around all that transformers builds, as it
    changes torch's default dtype meanwhile, for all threads."""

    def __init__(self, checkpoint: Path, initial_seed: int) -> None:
        self._config = transformers.AutoConfig.from_pretrained(checkpoint)
        self._lock = threading.RLock()
        self._seeds: dict[str, int] = {}
        self._models: OrderedDict[int, Any] = OrderedDict()
        self.initial_seed = initial_seed

    def weights(self, seed: int) -> dict[str, torch.Tensor]:
        """The checkpoint tensors of a seed."""
        with self._lock:
            return random_state_dict(self._config, seed)

    def announce(self, seed: int) -> str:
        """Weights of this seed are about to be published; returns what their version's name ends with."""
        with self._lock:
            source = make_source(self.weights(seed))
            source.refresh()
            (copies,) = compile_plan(source.manifest, {0: source.layout}, image_layout(source.manifest)).values()
            content = ExpectedDigest(source.manifest, copies, source.memory)
            ending = version_name(0, source.manifest, content.of(source.memory)).partition("-")[2]
            self._seeds[ending] = seed
        return ending

    def seed_of(self, version: str) -> int | None:
        """The seed of a version's weights; None when nobody announced it."""
        if version == "default":
            return self.initial_seed
        with self._lock:
            return self._seeds.get(version.partition("-")[2])

    def checksums(self, seed: int) -> dict[str, str]:
        """Digest per tensor, as engines report them."""
        return {name: f"{digest_tensor(value):016x}" for name, value in self.weights(seed).items()}

    def fault(self, answer: Answer) -> str | None:
        """What is wrong with an answer, in words; None when every token is the one its version's weights choose."""
        covered = 0
        for version, start, end in answer.spans:
            if start != covered or end <= start:
                return f"the spans {answer.spans} do not follow each other"
            covered = end
            seed = self.seed_of(version)
            if seed is None:
                return f"nobody published {version}"
            wrong = self._first_wrong(seed, answer, start, end)
            if wrong is not None:
                return f"token {wrong} is not what {version} says"
        if covered != len(answer.tokens):
            return f"{len(answer.tokens)} tokens, versions for {covered}"
        return None

    def _first_wrong(self, seed: int, answer: Answer, start: int, end: int) -> int | None:
        model = self._model(seed)
        ids = torch.tensor([answer.prompt + answer.tokens[:end]])
        first = len(answer.prompt) + start - 1
        with self._lock, torch.inference_mode():
            logits = model(ids).logits[0, first : first + end - start]
        chosen = logits.gather(1, torch.tensor(answer.tokens[start:end]).unsqueeze(1)).squeeze(1)
        bad = (logits.max(dim=1).values - chosen > TOLERANCE).nonzero()
        return None if bad.numel() == 0 else start + int(bad[0])

    def _model(self, seed: int) -> Any:
        with self._lock:
            if seed not in self._models:
                model = transformers.AutoModelForCausalLM.from_config(self._config, dtype=torch.float64)
                model.load_state_dict(_as_loaded(self.weights(seed), model), strict=False)
                self._models[seed] = model.eval()
            self._models.move_to_end(seed)
            while len(self._models) > KEPT:
                self._models.popitem(last=False)
            return self._models[seed]


def _as_loaded(weights: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    known: Sequence[str] = list(model.state_dict())
    missing = [name for name in weights if name not in known]
    if missing:
        raise ValueError(f"the reference model has no tensor {missing[0]!r}")
    return {name: value.double() for name, value in weights.items()}
