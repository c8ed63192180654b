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
    text, cause = str(error), error.__cause__
    path, named = _PATH.search(text), _NAMED.search(text)
    inner, reason, hint = named.group(1) if named else "", _PATH.sub("", text), None
    if isinstance(cause, InvalidInput):
        inner, reason, hint = cause.field or "", cause.message, cause.hint
    field = ".".join(part for part in (path.group(1) if path else "", inner) if part) or "body"
    where = field if what is None else f"{what}: {field}"
    return InvalidInput(f"{where}: {reason}", field=field, hint=hint)
