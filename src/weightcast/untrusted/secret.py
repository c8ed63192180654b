"""Secrets: which tokens can be used, and comparing them in a time that does not tell how much of a guess was right."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightcast.errors import InvalidInput

MAX_TOKEN_CHARACTERS = 4096


def usable_token(token: str | None, *, field: str = "token") -> str | None:
    """The token without the white space around it (a file ends with a newline); None stays None. InvalidInput, which never shows
    the token, when a header cannot carry it. Publishers, clients, commands and servers all take tokens through this function."""
    if token is None:
        return None
    if not isinstance(token, str):
        raise InvalidInput(f"{field} is a text, not {type(token).__name__}", field=field, hint="Decode bytes first")
    usable = token.strip()
    if not usable or len(usable) > MAX_TOKEN_CHARACTERS or not all("!" <= sign <= "~" for sign in usable):
        raise InvalidInput(
            f"{field} must be 1 to {MAX_TOKEN_CHARACTERS} printable ASCII characters without a space",
            field=field,
            hint="Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return usable


def token_from_file(path: Path) -> str:
    """The token that a file holds; InvalidInput names the file and never what is in it."""
    try:
        with path.open("rb") as file:
            token = file.read(4 * MAX_TOKEN_CHARACTERS).decode("ascii")
    except OSError as error:
        raise InvalidInput(f"cannot read the token file {path}: {error.strerror}", field="token_file") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"the token file {path} does not hold ASCII text", field="token_file") from None
    usable = usable_token(token, field="token_file")
    assert usable is not None
    return usable


def repr_without(*fields: str) -> Callable[[Any], str]:
    """A ``__repr__`` for records of msgspec that shows all but these fields: records get into tracebacks and logs."""

    def shown(record: Any) -> str:
        values = ((name, getattr(record, name)) for name in record.__struct_fields__)
        inner = ", ".join(f"{name}=..." if name in fields else f"{name}={value!r}" for name, value in values)
        return f"{type(record).__name__}({inner})"

    return shown


def same_secret(given: str | bytes, wanted: str | bytes) -> bool:
    """Whether two secrets are equal. Tokens and tickets are compared nowhere else, and by nothing else."""
    return hmac.compare_digest(_bytes(given), _bytes(wanted))


def _bytes(secret: str | bytes) -> bytes:
    return secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
