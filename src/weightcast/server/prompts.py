"""What a request wants continued: completion prompts one by one, chat messages through the model's own template."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import msgspec

from weightcast.errors import InvalidInput, Unsupported
from weightcast.server.schemas import ChatMessage, ChatRequest, CompletionRequest, UnsupportedField

PromptItem = str | list[int]


def completion_prompts(request: CompletionRequest, tokenizer: Any) -> list[PromptItem]:
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
        return [
            list(tokenizer.encode(item, add_special_tokens=False)) if isinstance(item, str) else item for item in items
        ]
    return items


def chat_prompt(request: ChatRequest, tokenizer: Any) -> list[int]:
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
    return _render(tokenizer, messages, kwargs)


def _item(item: str | int | list[int], index: int) -> PromptItem:
    if isinstance(item, int):
        raise InvalidInput(
            f"prompt mixes token ids with texts or lists at position {index}",
            field="prompt",
            hint="Send one list of token ids, or a list of prompts",
        )
    return item


def _message(message: ChatMessage, index: int) -> dict[str, Any]:
    if message.tool_calls or message.tool_call_id:
        raise UnsupportedField(f"messages[{index}].tool_calls", message.tool_calls or message.tool_call_id)
    fields = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    fields["content"] = _text(message.content, index)
    return fields


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


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
    """A template is a program over the caller's values: whatever it raises says that they do not fit it."""
    try:
        ids = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **kwargs)
    except Exception as error:
        raise InvalidInput(f"the chat template refuses these messages: {error}", field="messages") from error
    return [int(number) for number in ids]
