"""Comparing secrets: tokens, tickets and keys, in a time that does not tell how much of a guess was right."""

from __future__ import annotations

import hmac


def same_secret(given: str | bytes, wanted: str | bytes) -> bool:
    """Whether two secrets are equal. Tokens and tickets are compared nowhere else, and by nothing else."""
    return hmac.compare_digest(_bytes(given), _bytes(wanted))


def _bytes(secret: str | bytes) -> bytes:
    return secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
