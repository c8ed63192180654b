"""How long a text can be before it surely is too many tokens: counting the tokens of a text without end would take minutes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from weightcast.errors import PromptTooLong


def check_text_length(text: str, tokenizer: Any, max_model_len: int) -> None:
    """PromptTooLong for a text of more characters than ``max_model_len`` of the longest tokens have."""
    if len(text) > max_model_len * _longest_token(tokenizer):
        raise PromptTooLong.of(f"{len(text)} characters", max_model_len=max_model_len)


@lru_cache(maxsize=8)
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()))
