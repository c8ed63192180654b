"""URLs of engines: what can never be reached is refused by name before anything is sent, and user and password leave the name."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from weightcast.errors import InvalidInput
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.unix_urls import MAX_PATH_NBYTES, SCHEME, path_of_url, url_of_path
from weightcast.untrusted.secret import usable_token

SHAPE = "an engine is http://host:port, or unix:///path of a socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server is, and what its calls carry. ``url`` is the engine's name: no secret is in it.

    Calls go to ``base``, over the unix socket at ``socket_path`` where there is one.
    """

    url: str
    host: str
    headers: Mapping[str, str]
    base: str
    socket_path: str | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url})"


def endpoint_of(url: str, token: str | None = None) -> Endpoint:
    """The endpoint that an engine's URL names; raises InvalidInput for anything but http(s)://[user:password@]host[:port][/path]
    and unix:///path.

    User and password are sent as HTTP Basic; weightcast's servers take the password for the token. With a token as well they are for
    a proxy in between, and the token goes in a header of its own. The URL is checked as a whole: a port out of range, a bracket left
    open and a label too long for DNS are told apart by nobody later, they only end calls in the middle with errors of other libraries.
    """
    token = usable_token(token)
    if url.lower().startswith(f"{SCHEME}:"):
        return _unix_endpoint(url, token)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        usable = bool(host) and parts.scheme in ("http", "https") and (port is None or port > 0)
        (host or "").encode("idna")
    except (
        ValueError
    ):  # also a UnicodeError of the codec; its text would quote what stands in the URL, a password for example
        raise InvalidInput(f"{SHAPE}, not {_shown(url)}", field="engines") from None
    if not usable or host is None or not _is_plain(url):
        raise InvalidInput(f"{SHAPE}, not {_shown(url)}", field="engines")
    _refuse_more(parts, url)
    netloc = parts.netloc.rpartition("@")[2]
    clean = urlunsplit((parts.scheme, netloc, parts.path.rstrip("/"), "", ""))
    return Endpoint(url=clean, host=host, headers=_credentials(parts, token), base=clean)


def _unix_endpoint(url: str, token: str | None) -> Endpoint:
    """A server of this host: HTTP over a unix socket. The name is the URL that the server announces."""
    path = path_of_url(url) if _is_plain(url) else None
    if path is None:
        raise InvalidInput(
            f"{SHAPE}, not {_shown(url)}",
            field="engines",
            hint=f"The path is absolute, has at most {MAX_PATH_NBYTES} bytes, and signs that no URL has as %XX",
        )
    return Endpoint(
        url=url_of_path(path), host="127.0.0.1", headers=_bearer(token), base="http://localhost", socket_path=path
    )


def _is_plain(url: str) -> bool:
    return url.isascii() and not any(sign.isspace() or not sign.isprintable() for sign in url)


def engine_name(engine: str) -> str:
    """The name of an engine that is given by its URL, or by its name already."""
    return endpoint_of(engine).url if "://" in engine else engine


def _refuse_more(parts: SplitResult, url: str) -> None:
    """What a base URL has no use for."""
    if parts.path.rstrip("/").endswith("/v1"):
        raise InvalidInput(
            f"{SHAPE}, not {_shown(url)}: /v1 is the path of OpenAI's routes, and weights have routes beside them",
            field="engines",
            hint="Leave out /v1",
        )
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise InvalidInput(f"{SHAPE}, without a query or fragment, not {_shown(url)}", field="engines")


def _bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _credentials(parts: SplitResult, token: str | None) -> dict[str, str]:
    if parts.username is None and parts.password is None:
        return _bearer(token)
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    basic = {"Authorization": f"Basic {b64encode(pair.encode()).decode()}"}
    return basic if token is None else {**basic, "X-Weightcast-Token": token}


def _shown(url: str) -> str:
    """A URL in an error: what stands before the last @ may be a password."""
    before, at, after = url.rpartition("@")
    return repr(quoted(f"{before.partition('://')[0]}://...@{after}" if at else url, NAME_CHARACTERS))
