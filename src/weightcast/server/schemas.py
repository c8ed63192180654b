"""Bodies of the OpenAI routes. Unknown fields are refused by name; null means "not given".

Fields that other servers know and this one does not are declared too: their neutral value is accepted, anything else is
refused with the field's name, never ignored.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from weightcast.errors import InvalidInput, Unsupported

Prompt = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What /v1/completions and /v1/chat/completions share."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    # No effect here by their nature: bookkeeping of the caller's side, or hints about order and caching.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    priority: int | None = None
    service_tier: str | None = None
    cache_salt: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Only the neutral value.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    use_beam_search: bool | None = None
    echo: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    spaces_between_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    prompt_embeds: str | list[str] | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message; fields beyond role and content go to the chat template as they are."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "length_penalty": (1.0,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "echo": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "suffix": ("",),
    "prompt_embeds": ([],),
    "chat_template": (),
    "documents": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_HINTS = {
    "echo": "Ask for prompt_logprobs, and put the prompt in front yourself",
    "repetition_penalty": "",
    "presence_penalty": "Use repetition_penalty",
    "frequency_penalty": "Use repetition_penalty",
    "chat_template": "The template of the served model's tokenizer is used; chat_template_kwargs reach it",
    "truncate_prompt_tokens": "Shorten the prompt before sending it",
    "reasoning_effort": "Pass what the chat template understands in chat_template_kwargs",
}


class UnsupportedField(Unsupported):
    """A known request field with a value that this server does not carry out."""

    def __init__(self, field: str, value: Any, hint: str | None = None) -> None:
        super().__init__(f"{field}={str(value)[:60]!r} is not supported here", hint=hint or f"Leave {field} out")
        self.field = field


def check_supported(request: GenerationRequest) -> None:
    """Raise for every field whose value would have to be ignored, and for fields that contradict each other."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            raise UnsupportedField(name, value, _HINTS.get(name))
    if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n or 1):
        raise UnsupportedField("best_of", request.best_of, "Only best_of = n is possible; ask for n outputs")
    if request.stream_options is not None and not request.stream:
        raise InvalidInput("stream_options needs stream=true", field="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidInput("prompt_logprobs cannot be streamed", field="prompt_logprobs", hint="Leave out stream")
