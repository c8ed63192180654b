"""Checks of SamplingParams: values are normalised once, and an error names the field."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightcast.errors import InvalidInput

if TYPE_CHECKING:
    from weightcast.engines.base import SamplingParams

MAX_LOGPROBS = 1000
MAX_SAMPLES = 16384
MAX_PENALTY = 1e6
"""Logits that are multiplied or divided by no more than this stay finite numbers in float32."""
GREEDY_BELOW = 1e-5
"""A temperature below this means: take the likeliest token."""


def check_sampling_params(params: SamplingParams) -> None:
    """Validate every field and turn ``stop`` and ``stop_token_ids`` into tuples; raises InvalidInput."""
    from weightcast.engines.base import RequestOutputKind

    object.__setattr__(params, "stop", _stop_strings(params.stop))
    object.__setattr__(params, "stop_token_ids", _stop_ids(params.stop_token_ids))
    _integer(params, "n", low=1, high=MAX_SAMPLES)
    _number(params, "temperature", low=0.0)
    _number(params, "top_p", low=0.0, high=1.0, low_open=True)
    _integer(params, "top_k", low=-1)
    _number(params, "min_p", low=0.0, high=1.0)
    _number(params, "repetition_penalty", low=1 / MAX_PENALTY, high=MAX_PENALTY)
    _integer(params, "seed", low=-(2**63), high=2**64 - 1, optional=True)
    _integer(params, "max_tokens", low=1, optional=True)
    _integer(params, "min_tokens", low=0)
    _integer(params, "logprobs", low=0, high=MAX_LOGPROBS, optional=True)
    _integer(params, "prompt_logprobs", low=0, high=MAX_LOGPROBS, optional=True)
    for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
        if not isinstance(getattr(params, name), bool):
            raise InvalidInput(f"{name} is true or false, not {getattr(params, name)!r}", field=name)
    if not isinstance(params.output_kind, RequestOutputKind):
        raise InvalidInput(f"output_kind is a RequestOutputKind, not {params.output_kind!r}", field="output_kind")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidInput(
            f"min_tokens {params.min_tokens} is more than max_tokens {params.max_tokens}", field="min_tokens"
        )


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = _items(value, "stop", single=str)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise InvalidInput(f"stop holds non-empty strings, not {text!r}", field="stop")
    return strings


def _stop_ids(value: Any) -> tuple[int, ...]:
    ids = _items(value, "stop_token_ids", single=int)
    for token in ids:
        if not _is_integer(token) or token < 0:
            raise InvalidInput(f"stop_token_ids holds token ids, not {token!r}", field="stop_token_ids")
    return ids


def _items(value: Any, name: str, *, single: type) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, single):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        raise InvalidInput(f"{name} is a list, not {value!r}", field=name)
    return tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(params: SamplingParams, name: str, *, low: int, high: int | None = None, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    if not _is_integer(value):
        raise InvalidInput(f"{name} is an integer, not {value!r}", field=name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidInput(f"{name} is {bound}, not {value}", field=name)


def _number(params: SamplingParams, name: str, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{name} is a finite number, not {value!r}", field=name)
    if value < low or value > high or (low_open and value == low):
        above = "above" if low_open else "at least"
        bound = f"{above} {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        raise InvalidInput(f"{name} is {bound}, not {value!r}", field=name)
