"""Quoted: text that a peer sent, made fit for an error, a log and a terminal. Pure.

A peer's text may be long, may hold the escape sequences that move a terminal's cursor, and may hold newlines that look like lines of
a log. Every such text goes through one of these functions before anybody keeps or prints it.
"""

from __future__ import annotations

from typing import Any

import msgspec

TEXT_CHARACTERS = 2000
NAME_CHARACTERS = 300
TRACE_CHARACTERS = 8000
MAX_DEPTH = 8


def quoted(text: str, limit: int = TEXT_CHARACTERS) -> str:
    """The text on one line of at most ``limit`` characters; characters that cannot be printed are written as escapes."""
    return _cut(_printable(" ".join(_cut(text, limit).split())), limit)


def quoted_lines(text: str, limit: int = TRACE_CHARACTERS) -> str:
    """The end of a text of several lines, such as a traceback; at most ``limit`` characters, lines cleaned as ``quoted`` does."""
    lines = "\n".join(_printable(line.expandtabs()) for line in text[-limit:].splitlines())
    return lines[-limit:]


def quoted_json(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A decoded JSON value whose texts, keys included, are ``quoted``; what is nested without end is cut off."""
    if isinstance(value, str):
        return quoted(value)
    if depth == 0:
        return None
    if isinstance(value, dict):
        return {quoted(str(key), NAME_CHARACTERS): quoted_json(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, list):
        return [quoted_json(entry, depth - 1) for entry in value]
    return value


def quote_fields(record: msgspec.Struct) -> None:
    """Quote the texts of a record that is being made or decoded, and those in its tuples of texts: for ``__post_init__``."""
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, str):
            msgspec.structs.force_setattr(record, name, quoted(value))
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            clean = tuple(quoted(text, NAME_CHARACTERS) for text in value)
            msgspec.structs.force_setattr(record, name, clean)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
