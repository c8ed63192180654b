"""From msgspec's refusal of a value to InvalidInput that names the field. Pure."""

from __future__ import annotations

import re

import msgspec

from weightcast.errors import InvalidInput

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_NAMED = re.compile(r"field `([^`]+)`")


def invalid_input(error: msgspec.ValidationError, *, what: str | None = None) -> InvalidInput:
    """The error to raise: ``field`` is the path to the value, "body" for the whole of it.

    A missing or unknown field is named in msgspec's text; one that a struct's own ``__post_init__`` refused, in the
    InvalidInput behind msgspec's error. ``what`` begins the message.
    """
    text = str(error)
    path, named = _PATH.search(text), _NAMED.search(text)
    prefix = path.group(1) if path else ""
    cause = error.__cause__
    if isinstance(cause, InvalidInput):
        name = cause.field or ""
    else:
        name = named.group(1) if named else ""
    field = ".".join(part for part in (prefix, name) if part) or "body"
    hint = cause.hint if isinstance(cause, InvalidInput) else None
    reason = cause.message if isinstance(cause, InvalidInput) else _PATH.sub("", text)
    where = field if what is None else f"{what}: {field}"
    return InvalidInput(f"{where}: {reason}", field=field, hint=hint)
