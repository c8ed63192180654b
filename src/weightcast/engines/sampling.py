"""SamplingParams: how one request is sampled; names and defaults are vLLM's, and the record validates itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from weightcast.engines.sampling_checks import biases, boolean, integer, number, stop_ids, stop_strings
from weightcast.errors import InvalidInput

MAX_LOGPROBS = 1000
MAX_SAMPLES = 16384
MAX_PENALTY = 1e6
"""Logits that are multiplied or divided by no more than this stay finite numbers in float32."""
MAX_BIAS = 100.0
MAX_COUNT_PENALTY = 2.0
"""The bounds of OpenAI's API for ``logit_bias``, and for ``presence_penalty`` and ``frequency_penalty``."""
GREEDY_BELOW = 1e-5
"""A temperature below this means: take the likeliest token."""


class RequestOutputKind(Enum):
    """Which outputs of a request its caller wants to see; names and values are vLLM's."""

    CUMULATIVE = 0
    """One after each step, each with everything so far."""
    FINAL_ONLY = 2
    """The last one. An engine may give others, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form that an answer must have, given by exactly one of the fields; field names are vLLM's."""

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, as text or decoded."""
    json_object: bool | None = None
    """True: any JSON object."""
    regex: str | None = None
    """A regular expression that matches the whole answer."""
    choice: tuple[str, ...] | None = None
    """The answer is one of these texts."""
    grammar: str | None = None
    """A grammar in Lark's or GBNF's notation."""

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        if self.choice is not None:
            object.__setattr__(self, "choice", stop_strings("choice", self.choice))
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        if len(given) != 1 or self.choice == ():
            names = ", ".join(given) or "none"
            raise InvalidInput(f"structured_outputs needs exactly one form, not {names}", field="structured_outputs")
        for name in {"regex", "grammar"} & set(given):
            if not isinstance(getattr(self, name), str):
                raise InvalidInput(f"structured_outputs.{name} is a text", field=f"structured_outputs.{name}")


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
    """Divides the positive and multiplies the negative logits of all tokens in prompt and output."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that is in the output."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that the token is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens, before any penalty."""
    structured_outputs: StructuredOutputs | None = None
    """Only tokens that keep the output in this form are sampled; the end of a text only where the form is complete."""
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
        number("presence_penalty", self.presence_penalty, low=-MAX_COUNT_PENALTY, high=MAX_COUNT_PENALTY)
        number("frequency_penalty", self.frequency_penalty, low=-MAX_COUNT_PENALTY, high=MAX_COUNT_PENALTY)
        object.__setattr__(self, "logit_bias", biases("logit_bias", self.logit_bias, bound=MAX_BIAS))
        integer("seed", self.seed, low=-(2**63), high=2**64 - 1, optional=True)
        integer("max_tokens", self.max_tokens, low=1, optional=True)
        integer("min_tokens", self.min_tokens, low=0)
        integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            boolean(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidInput(f"output_kind is a RequestOutputKind, not {self.output_kind!r}", field="output_kind")
        if not isinstance(self.structured_outputs, StructuredOutputs | None):
            raise InvalidInput("structured_outputs is a StructuredOutputs or None", field="structured_outputs")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            more = f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}"
            raise InvalidInput(more, field="min_tokens")
