"""Who may call what: a bearer token, compared in constant time; without one, this machine only.

Without a token a page in the user's browser must not be able to reach the routes either (a form post or a rebound DNS
name comes from loopback too), so the Host header must name loopback and an Origin header, if any, must too.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from weightcast.errors import AuthError, InvalidInput
from weightcast.secret import same_secret

TOKEN_HEADER = "x-weightcast-token"


def is_loopback(host: str) -> bool:
    """Whether a host name or address (no port) can only mean this machine."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def check_host(host: str, token: str | None) -> None:
    """Refuse to bind ``host`` for others without a token (InvalidInput names it)."""
    if token is None and not is_loopback(host):
        raise InvalidInput(
            f"--host {host} can be reached from other machines, and no token guards the weights",
            field="host",
            hint="Give --token (or the variable WEIGHTCAST_TOKEN), or bind 127.0.0.1",
        )


class TokenAuth:
    """Guards routes with ``token``; None lets in only clients of this machine."""

    def __init__(self, token: str | None, *, what: str = "token") -> None:
        self._token = token
        self._what = what

    @property
    def configured(self) -> bool:
        return self._token is not None

    def check(self, request: HTTPConnection) -> None:
        """Return if the caller may go on; AuthError otherwise, which does not say how close a wrong token was."""
        if self._token is None:
            self._check_local(request)
            return
        given = presented_token(request)
        if given is None:
            raise AuthError(f"this route needs the {self._what}", hint="Send 'Authorization: Bearer ...'")
        if not self.matches(given):
            raise AuthError(f"wrong {self._what}")

    def matches(self, given: str) -> bool:
        """Constant-time comparison with the configured secret."""
        return self._token is not None and same_secret(given, self._token)

    def _check_local(self, request: HTTPConnection) -> None:
        hint = "Start the server with a token to call this route from elsewhere"
        if request.client is not None and not is_loopback(request.client.host):
            raise AuthError(f"without a token this route answers loopback only, not {request.client.host}", hint=hint)
        for header in ("host", "origin"):
            value = request.headers.get(header)
            if value is not None and not is_loopback(_host_of(value)):
                raise AuthError(f"without a token the {header} header must name this machine, not {value!r}", hint=hint)


def presented_token(request: HTTPConnection) -> str | None:
    """The secret a caller sent, in either header; None if there is none."""
    own = request.headers.get(TOKEN_HEADER)
    if own is not None:
        return own
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" and value.strip() else None


def _host_of(value: str) -> str:
    try:
        return urlsplit(value if "://" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""
