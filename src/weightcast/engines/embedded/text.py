"""Text: the tokenizer as the engine uses it. Without a tokenizer the engine takes and gives token ids only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightcast.engines.embedded.detokenize import Decode
from weightcast.engines.lengths import check_text_length
from weightcast.errors import InvalidInput


class Text:
    """Encodes prompts and decodes tokens; remembers the text of single tokens."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self.tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._tokens: dict[int, str] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # Otherwise the first call would change them, and other threads may encode at that moment.
            backend.no_truncation()
            backend.no_padding()

    def decoder(self, *, skip_special_tokens: bool) -> Decode | None:
        """A function from token ids to text, or None without a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
            return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token: int) -> str:
        """The text of one token alone; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text = self._tokens.get(token)
        if text is None:
            text = self._tokens[token] = str(self.tokenizer.decode([token]))
        return text

    def prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        """Text and token ids of a prompt given as text, token ids or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                text = prompt.get("prompt")
                return text, _ids(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise InvalidInput("a prompt object has prompt or prompt_token_ids", field="prompt")
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._encode(prompt)
        return None, _ids(prompt)

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        """Token ids of a conversation, by the tokenizer's chat template, ready for the assistant's answer."""
        tokenizer = self._required()
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidInput("the tokenizer has no chat template", field="messages", hint="Send a plain prompt")
        template.setdefault("add_generation_prompt", True)
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **template)
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self._required()
        check_text_length(text, tokenizer, self._max_model_len)
        # Not verbose: the library would warn of indexing errors, and this engine refuses what is too long for it.
        return [int(t) for t in tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)]

    def _required(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInput("this engine has no tokenizer", field="prompt", hint="Send token ids")
        return self.tokenizer


def _ids(value: Any) -> list[int]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise InvalidInput(f"a prompt is text or a list of token ids, not {type(value).__name__}", field="prompt")
    if any(not isinstance(token, int) or isinstance(token, bool) for token in value):
        raise InvalidInput("a prompt's token ids are integers", field="prompt")
    return list(value)
