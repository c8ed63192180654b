"""Log-probabilities in both OpenAI dialects, and prompt log-probabilities as vLLM writes them.

JSON has no minus infinity: a token that cannot be sampled gets -9999, as with vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightcast.engines.base import Logprob

IMPOSSIBLE = -9999.0

Entries = Sequence[Mapping[int, Logprob] | None]
"""The likeliest tokens at each place, with the token that stands there; None where nothing predicts it."""


def token_name(token_id: int, decoded: str, as_id: bool) -> str:
    """How a token is called in an answer: its text, or "token_id:N" where the request asks for that."""
    return f"token_id:{token_id}" if as_id else decoded


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Entries,
    num_top: int,
    text_offset: int,
    as_ids: bool,
    text_of: Callable[[int], str],
) -> dict[str, Any]:
    """/v1/completions: four lists, one entry a token. ``top_logprobs`` holds the sampled token too. The first token of a prompt that
    is echoed has no entry, for nothing predicts it: null, and its text by ``text_of``."""
    names: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        text = text_of(token_id) if entry is None else entry[token_id].decoded_token
        names.append(token_name(token_id, text, as_ids))
        offsets.append(text_offset)
        text_offset += len(text)
        if entry is None:
            values.append(None)
            tops.append(None)
            continue
        sampled = entry[token_id]
        values.append(_finite(sampled.logprob))
        shown = {token_id: sampled, **_likeliest(entry, num_top)}
        tops.append(_by_name(shown, as_ids))
    return {"text_offset": offsets, "token_logprobs": values, "tokens": names, "top_logprobs": tops}


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]], num_top: int, as_ids: bool
) -> dict[str, Any]:
    """/v1/chat/completions: one object a token, with the likeliest tokens beside it."""
    content = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        tops = [_chat_entry(key, lp, as_ids) for key, lp in _likeliest(entry, num_top).items()]
        content.append({**_chat_entry(token_id, entry[token_id], as_ids), "top_logprobs": tops})
    return {"content": content}


def prompt_logprobs(entries: Entries) -> list[dict[str, Any] | None]:
    """One object a prompt position, keyed by token id; null for the first, which nothing predicts."""
    return [
        None
        if entry is None
        else {
            str(key): {"logprob": _finite(lp.logprob), "rank": lp.rank, "decoded_token": lp.decoded_token}
            for key, lp in entry.items()
        }
        for entry in entries
    ]


def text_length(token_ids: Sequence[int], logprobs: Entries, text_of: Callable[[int], str]) -> int:
    """Characters that these tokens add to ``text_offset``."""
    return sum(
        len(text_of(token_id) if entry is None else entry[token_id].decoded_token)
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    )


def _by_name(entry: Mapping[int, Logprob], as_ids: bool) -> dict[str, float]:
    """Parts of characters have one name: the likeliest of them has the place, so that no token is likelier than all that are shown."""
    found: dict[str, float] = {}
    for key, logprob in entry.items():
        name = token_name(key, logprob.decoded_token, as_ids)
        found[name] = max(_finite(logprob.logprob), found.get(name, IMPOSSIBLE))
    return found


def _likeliest(entry: Mapping[int, Logprob], num_top: int) -> dict[int, Logprob]:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return dict(ranked[:num_top])


def _chat_entry(token_id: int, logprob: Logprob, as_ids: bool) -> dict[str, Any]:
    text = logprob.decoded_token
    return {
        "token": token_name(token_id, text, as_ids),
        "logprob": _finite(logprob.logprob),
        "bytes": list(text.encode("utf-8", "replace")),
    }


def _finite(value: float) -> float:
    return max(value, IMPOSSIBLE)
