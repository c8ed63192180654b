"""Bodies of the OpenAI routes. Fields that nobody knows are ignored, as with vLLM, and named in the log; null means "not given".

Fields that other servers know and this one does not are declared too: their neutral value is accepted, anything else is
refused with the field's name, never ignored.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from weightcast.errors import InvalidInput, Unsupported

Prompt = str | list[str | int | list[int]]


class JsonSchema(msgspec.Struct, kw_only=True):
    """A JSON schema as OpenAI's API wraps it. ``strict`` says nothing new: an answer always keeps to the schema."""

    schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputsBody(msgspec.Struct, kw_only=True):
    """The form that an answer must have, as vLLM's clients write it."""

    json: str | dict[str, Any] | bool | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class Function(msgspec.Struct, kw_only=True):
    """A function that a model may call; everything else about it reaches the chat template as it is."""

    name: str


class Tool(msgspec.Struct, kw_only=True):
    """What is checked of a tool."""

    type: Literal["function"]
    function: Function


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    # Only the neutral value.
    length_penalty: float | None = None
    use_beam_search: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    spaces_between_special_tokens: bool | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    """The prompt comes back in front of the answer, with its log-probabilities where those are asked for."""
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


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    echo: bool | None = None
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
    "length_penalty": (1.0,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "suffix": ("",),
    "prompt_embeds": ([],),
    "chat_template": (),
    "documents": ([],),
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
    "tool_choice": "Give response_format or structured_outputs: they force an answer into a form",
    "guided_json": 'Use structured_outputs: {"json": ...}',
    "guided_regex": 'Use structured_outputs: {"regex": ...}',
    "guided_choice": 'Use structured_outputs: {"choice": ...}',
    "guided_grammar": 'Use structured_outputs: {"grammar": ...}',
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
    if isinstance(request, ChatRequest) and request.echo:
        raise UnsupportedField("echo", True, "Put the last message in front yourself")
    if request.stream_options is not None and not request.stream:
        raise InvalidInput("stream_options needs stream=true", field="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidInput("prompt_logprobs cannot be streamed", field="prompt_logprobs", hint="Leave out stream")
