"""Request and Sequence: what the engine knows of a call to generate and of each of its n outputs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from weightcast.engines.base import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    SamplingParams,
    VersionSpan,
)
from weightcast.engines.embedded.adapters import AdapterVersion
from weightcast.engines.embedded.detokenize import Detokenizer
from weightcast.engines.embedded.grammar import Grammar
from weightcast.engines.embedded.kv import Shelf
from weightcast.engines.sampling import GREEDY_BELOW

Sink = Callable[[RequestOutput], None]


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One call to generate. ``sink`` is called on the engine's thread with all outputs, or with the last one alone."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sink: Sink
    stream: bool
    grammar: Grammar | None = None
    """The form of the answers, at its beginning: each sequence follows a copy."""
    adapter: str | None = None
    """The adapter that is asked for: the name alone for what it stands for when the request is queued, or with a version."""
    adapter_version: AdapterVersion | None = None
    """What the request runs on, from its first step to its last."""
    bounded: bool = True
    """False: taken even when the queue is full."""
    arrival: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """A snapshot that the engine will not touch any more."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.finished,
            prompt_logprobs=None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            error=self.error,
            adapter=None if self.adapter_version is None else self.adapter_version.label,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One of a request's outputs. ``tokens`` holds prompt and output; ``num_computed`` of them are in the KV cache."""

    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    rng: random.Random
    detokenizer: Detokenizer | None
    grammar: Grammar | None = None
    num_computed: int = 0
    kv_epoch: int = -1
    """The weights epoch in which its first key was computed."""
    shelf: Shelf | None = None
    row: int = -1
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float = 0.0
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: str = ""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW

    @property
    def order(self) -> tuple[int, int]:
        """Oldest first."""
        return self.request.arrival, self.index

    def append(self, token: int, version: str) -> None:
        """Add a sampled token, made by weights of ``version``."""
        at = self.num_output
        self.tokens.append(token)
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1], at + 1)
        else:
            self.spans.append((version, at, at + 1))

    def forget(self) -> None:
        """Note that nothing of the sequence is in the KV cache any more. The cache itself releases the row."""
        self.num_computed = 0
        self.kv_epoch = -1

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.tokens[self.num_prompt :],
            logprobs=None if self.logprobs is None else list(self.logprobs),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            weight_versions=[VersionSpan(version=name, start=start, end=end) for name, start, end in self.spans],
        )
