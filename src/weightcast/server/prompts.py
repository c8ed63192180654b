"""What a request wants continued: completion prompts one by one, chat messages through the model's own template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import msgspec

from weightcast.engines.lengths import check_text_length
from weightcast.errors import InvalidInput, Unsupported
from weightcast.server.schemas import ChatMessage, ChatRequest, CompletionRequest, Tool, UnsupportedField
from weightcast.untrusted.invalid import invalid_input
from weightcast.untrusted.known import known

PromptItem = str | list[int]


def completion_prompts(request: CompletionRequest, tokenizer: Any, max_model_len: int) -> list[PromptItem]:
    """The prompts in order: one text, several texts, one list of token ids, several of them, or a mix of the last."""
    prompt = request.prompt
    if isinstance(prompt, str):
        items: list[PromptItem] = [prompt]
    elif not prompt:
        raise InvalidInput("prompt is empty", field="prompt")
    elif all(isinstance(item, int) for item in prompt):
        items = [[item for item in prompt if isinstance(item, int)]]
    else:
        items = [_item(item, index) for index, item in enumerate(prompt)]
    if request.add_special_tokens is False and any(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise InvalidInput("the served model has no tokenizer", field="prompt", hint="Send token ids")
        return [_without_special(item, tokenizer, max_model_len) if isinstance(item, str) else item for item in items]
    return items


def _without_special(text: str, tokenizer: Any, max_model_len: int) -> list[int]:
    check_text_length(text, tokenizer, max_model_len)
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def chat_prompt(request: ChatRequest, tokenizer: Any, max_model_len: int) -> list[int]:
    """Token ids of the messages in the served model's chat template."""
    if not request.messages:
        raise InvalidInput("messages is empty", field="messages")
    if getattr(tokenizer, "chat_template", None) is None:
        raise Unsupported(
            "the served model's tokenizer has no chat template", hint="Use /v1/completions with a prompt of your own"
        )
    if request.add_special_tokens:
        raise UnsupportedField("add_special_tokens", True, "The chat template writes the special tokens")
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    kwargs = _template_kwargs(request, tokenizer)
    if request.tools:
        kwargs["tools"] = _tools(request.tools, tokenizer)
    text = _render(tokenizer, messages, kwargs)
    check_text_length(text, tokenizer, max_model_len)
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def prompt_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of a prompt that was given as token ids, special tokens and all; empty without a tokenizer."""
    return "" if tokenizer is None else str(tokenizer.decode(list(ids)))


def _item(item: str | int | list[int], index: int) -> PromptItem:
    if isinstance(item, int):
        raise InvalidInput(
            f"prompt mixes token ids with texts or lists at position {index}",
            field="prompt",
            hint="Send one list of token ids, or a list of prompts",
        )
    return item


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    fields = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    fields["content"] = _text(message.content, index)
    if message.tool_calls is not None:
        fields["tool_calls"] = [
            _tool_call(call, f"messages[{index}].tool_calls[{number}]")
            for number, call in enumerate(message.tool_calls)
        ]
    return fields


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """A call as chat templates take it: with its arguments decoded, which OpenAI's clients send as JSON text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInput(f"{where}.function needs a name", field=f"{where}.function")
    arguments = function.get("arguments") or {}
    try:
        decoded = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except (msgspec.DecodeError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        field = f"{where}.function.arguments"
        raise InvalidInput(f"{field} is a JSON object, or the text of one", field=field)
    return {**call, "function": {**function, "arguments": decoded}}


def _text(content: str | list[dict[str, Any]] | None, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        where = f"messages[{index}].content[{number}]"
        if part.get("type") != "text":
            raise UnsupportedField(f"{where}.type", part.get("type"), "Only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise InvalidInput(f"{where}.text must be a string", field=f"{where}.text")
        texts.append(part["text"])
    return "\n".join(texts)


def _template_kwargs(request: ChatRequest, tokenizer: Any) -> dict[str, Any]:
    extra = dict(request.chat_template_kwargs or {})
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "self"}
    for name in extra:
        if name in reserved:
            field = f"chat_template_kwargs.{name}"
            raise InvalidInput(f"{field} is not a variable of a chat template", field=field)
    return {
        "add_generation_prompt": request.add_generation_prompt is not False and not request.continue_final_message,
        "continue_final_message": bool(request.continue_final_message),
        **extra,
    }


def _tools(tools: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The tools as the chat template gets them; refused where the template has no place for them."""
    try:
        msgspec.convert(tools, known(list[Tool]))
    except msgspec.ValidationError as error:
        refused = invalid_input(error)
        field = "tools" if refused.field == "body" else f"tools{refused.field}"
        raise InvalidInput(f"tools: {refused.message}", field=field) from None
    if "tools" not in tokenizer.get_chat_template(tools=tools):
        raise UnsupportedField("tools", tools, "The chat template of the served model knows no tools")
    return tools


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], kwargs: dict[str, Any]) -> str:
    """A template is a program over the caller's values: whatever it raises says that they do not fit it."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs))
    except Exception as error:
        raise InvalidInput(f"the chat template refuses these messages: {error}", field="messages") from error
