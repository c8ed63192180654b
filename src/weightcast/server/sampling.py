"""From a request's fields to SamplingParams: null becomes the default, ranges are checked by SamplingParams itself."""

from __future__ import annotations

from typing import Any

from weightcast.engines.sampling import SamplingParams, StructuredOutputs
from weightcast.errors import InvalidInput
from weightcast.server.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    StructuredOutputsBody,
    UnsupportedField,
)

_PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def completion_sampling(request: CompletionRequest) -> SamplingParams:
    """/v1/completions: ``logprobs`` is a number, 0 means the sampled token only; 16 tokens by default.

    A prompt that is echoed has log-probabilities like the answer. No tokens at all, which makes sense for an echo alone, are one
    for the engine; the answer is written without it.
    """
    fields = _shared_fields(request)
    fields["logprobs"] = request.logprobs
    if request.max_tokens is not None:
        fields["max_tokens"] = max(request.max_tokens, 1) if request.echo else request.max_tokens
    if request.echo and request.logprobs is not None:
        fields["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
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
    fields["structured_outputs"] = _form(request)
    return fields


def _form(request: GenerationRequest) -> StructuredOutputs | None:
    """The form that ``response_format`` or ``structured_outputs`` asks for; both at once are refused."""
    wanted, given = request.response_format, request.structured_outputs
    by_format = None
    if wanted is not None and wanted.type == "json_object":
        by_format = StructuredOutputs(json_object=True)
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidInput("response_format of type json_schema needs json_schema", field="response_format")
        by_format = StructuredOutputs(json=wanted.json_schema.schema)
    if given is None:
        return by_format
    if by_format is not None:
        raise InvalidInput("response_format and structured_outputs are both given", field="structured_outputs")
    return _vllm_form(given)


def _vllm_form(given: StructuredOutputsBody) -> StructuredOutputs:
    for name in ("structural_tag", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
        if value := getattr(given, name):
            raise UnsupportedField(f"structured_outputs.{name}", value)
    return StructuredOutputs(
        json=given.json,
        json_object=given.json_object,
        regex=given.regex,
        choice=None if given.choice is None else tuple(given.choice),
        grammar=given.grammar,
    )
