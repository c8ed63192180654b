"""Who may call what: a token, compared in constant time; without one, this machine only.

Without a token four things must not get in although they come from a loopback address: a page of another site in the user's browser
(a form, a rebound DNS name, a page of another port), and whatever a proxy on this machine passes on. So the Host header must name this
machine, an Origin header the very server that is called, and headers that proxies add must be absent, on open routes as well. A client
that comes over a unix socket has no address; it is of this machine, and its own headers follow the same rules.
"""

from __future__ import annotations

import binascii
import ipaddress
from base64 import b64decode
from collections.abc import Callable, Mapping
from typing import Literal

from starlette.requests import HTTPConnection

from weightcast.errors import AuthError, InvalidInput
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.server.pages import authority_of, foreign_page
from weightcast.untrusted.secret import same_secret, usable_token

Guard = Literal["open", "token", "api_key"]
Check = Callable[[HTTPConnection], None]
"""Returns if the caller may go on; raises AuthError otherwise."""

TOKEN_HEADER = "x-weightcast-token"
FORWARDING_HEADERS = (
    "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip", "cf-connecting-ip",
    "fastly-client-ip", "x-original-forwarded-for", "x-original-host", "x-envoy-external-address",
)  # fmt: skip
"""Headers that proxies add, beside all that begin with ``x-forwarded``."""
_TOKEN_HINT = "Start the server with a token to call this route from elsewhere"


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
            hint="Give --token-file (or the variable WEIGHTCAST_TOKEN), or bind 127.0.0.1",
        )


class TokenAuth:
    """Guards routes with ``token``; None lets in only clients of this machine, and no page of another site."""

    def __init__(self, token: str | None, *, what: str = "token") -> None:
        self._token = usable_token(token)
        self._what = what
        self._hint = "Send 'Authorization: Bearer ...'"
        if what == "token":
            self._hint += ": Publisher(token=...), or --token-file or WEIGHTCAST_TOKEN of a command"

    def check(self, request: HTTPConnection) -> None:
        """Return if the caller may go on; AuthError otherwise, which does not say how close a wrong token was."""
        if self._token is None:
            _check_client(request)
            _check_direct(request)
            return
        given = presented_token(request)
        if given is None:
            raise AuthError(f"this route needs the {self._what}", hint=self._hint)
        if not same_secret(given, self._token):
            raise AuthError(f"wrong {self._what}", hint=self._hint)

    def check_open(self, request: HTTPConnection) -> None:
        """For routes that need no token. A server with a token answers everybody there; one without a token is meant for this
        machine and answers neither what came through a proxy nor pages of other sites. Inside a server that is bound for others
        (vLLM's) clients of other machines may read."""
        if self._token is not None:
            return
        if request.client is None or is_loopback(request.client.host):
            _check_direct(request)
        else:
            _check_unforwarded(request)
            _check_page(request)


def guards_of(auth: TokenAuth, api_key: TokenAuth | None = None) -> Mapping[Guard, Check]:
    """What the routes of a server check. Those of /v1 are open where there is no API key."""
    return {
        "open": auth.check_open,
        "token": auth.check,
        "api_key": auth.check_open if api_key is None else api_key.check,
    }


def presented_token(request: HTTPConnection) -> str | None:
    """The secret a caller sent: in our own header, as a bearer token, or as the password of HTTP Basic; None if there is none.

    A browser sends a password that it knows along with requests of any page, so one of another site's page does not count.
    """
    own = request.headers.get(TOKEN_HEADER)
    if own is not None:
        return own
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "basic" and foreign_page(_method(request), request.headers) is None:
        return _password(value)
    return value if scheme.lower() == "bearer" and value else None


def _password(value: str) -> str | None:
    try:
        _, colon, password = b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):  # ValueError: not ASCII, not UTF-8
        return None
    return password if colon and password else None


def _check_client(request: HTTPConnection) -> None:
    if request.client is not None and not is_loopback(request.client.host):
        client = quoted(request.client.host, NAME_CHARACTERS)
        raise AuthError(f"without a token this route answers loopback only, not {client}", hint=_TOKEN_HINT)


def _check_unforwarded(request: HTTPConnection) -> None:
    """Refuse what a proxy passed on. Who asks then is not known: uvicorn takes the client's address from such headers, too."""
    for name in request.headers:
        if name in FORWARDING_HEADERS or name.startswith("x-forwarded"):
            header = quoted(name, NAME_CHARACTERS)
            raise AuthError(f"without a token nothing is answered that a proxy passed on ({header})", hint=_TOKEN_HINT)


def _check_direct(request: HTTPConnection) -> None:
    """Refuse what a proxy passed on, another name for this machine, and pages of other sites."""
    _check_unforwarded(request)
    host = request.headers.get("host")
    authority = authority_of(host)
    if host is not None and (authority is None or not is_loopback(authority[0])):
        said = quoted(host, NAME_CHARACTERS)
        raise AuthError(f"without a token the host header must name this machine, not {said!r}", hint=_TOKEN_HINT)
    _check_page(request)


def _check_page(request: HTTPConnection) -> None:
    why = foreign_page(_method(request), request.headers)
    if why is not None:
        raise AuthError(f"without a token {why}", hint=_TOKEN_HINT)


def _method(request: HTTPConnection) -> str:
    return str(request.scope.get("method", "GET"))
