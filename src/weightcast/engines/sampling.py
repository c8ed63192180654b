"""SamplingParams: how one request is sampled; names and defaults are vLLM's, and the record validates itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from weightcast.engines.sampling_checks import boolean, integer, number, stop_ids, stop_strings
from weightcast.errors import InvalidInput

MAX_LOGPROBS = 1000
MAX_SAMPLES = 16384
MAX_PENALTY = 1e6
"""Logits that are multiplied or divided by no more than this stay finite numbers in float32."""
GREEDY_BELOW = 1e-5
"""A temperature below this means: take the likeliest token."""


class RequestOutputKind(Enum):
    """Which outputs of a request its caller wants to see; names and values are vLLM's."""

    CUMULATIVE = 0
    """One after each step, each with everything so far."""
    FINAL_ONLY = 2
    """The last one. An engine may give others, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request; field names and defaults are vLLM's. Validates itself (InvalidInput names the field)."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Any signed or unsigned 64-bit number; with it a request's tokens do not depend on what else is in the batch."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """None: none; 0: of the sampled token; N: also of the N likeliest. Natural log of the distribution sampled from."""
    prompt_logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """FINAL_ONLY saves the making of outputs that nobody reads."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", stop_strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", stop_ids("stop_token_ids", self.stop_token_ids))
        integer("n", self.n, low=1, high=MAX_SAMPLES)
        number("temperature", self.temperature, low=0.0)
        number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        integer("top_k", self.top_k, low=-1)
        number("min_p", self.min_p, low=0.0, high=1.0)
        number("repetition_penalty", self.repetition_penalty, low=1 / MAX_PENALTY, high=MAX_PENALTY)
        integer("seed", self.seed, low=-(2**63), high=2**64 - 1, optional=True)
        integer("max_tokens", self.max_tokens, low=1, optional=True)
        integer("min_tokens", self.min_tokens, low=0)
        integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            boolean(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidInput(f"output_kind is a RequestOutputKind, not {self.output_kind!r}", field="output_kind")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            more = f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}"
            raise InvalidInput(more, field="min_tokens")
