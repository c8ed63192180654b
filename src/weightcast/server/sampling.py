"""From a request's fields to SamplingParams: null becomes the default, ranges are checked by SamplingParams itself."""

from __future__ import annotations

from typing import Any

from weightcast.engines.base import SamplingParams
from weightcast.errors import InvalidInput
from weightcast.server.schemas import ChatRequest, CompletionRequest, GenerationRequest

_PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def completion_sampling(request: CompletionRequest) -> SamplingParams:
    """/v1/completions: ``logprobs`` is a number, 0 means the sampled token only; 16 tokens by default."""
    fields = _shared_fields(request)
    fields["logprobs"] = request.logprobs
    if request.max_tokens is not None:
        fields["max_tokens"] = request.max_tokens
    return SamplingParams(**fields)


def chat_sampling(request: ChatRequest) -> SamplingParams:
    """/v1/chat/completions: ``logprobs`` is a flag beside ``top_logprobs``; the rest of the context by default."""
    fields = _shared_fields(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidInput("top_logprobs needs logprobs=true", field="top_logprobs")
    fields["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidInput("max_tokens and max_completion_tokens differ", field="max_completion_tokens")
    fields["max_tokens"] = next(iter(limits), None)
    return SamplingParams(**fields)


def _shared_fields(request: GenerationRequest) -> dict[str, Any]:
    fields = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    if request.stop is not None:
        fields["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        fields["stop_token_ids"] = tuple(request.stop_token_ids)
    return fields
