"""Pages of other sites: a request that a browser sends for somebody else's page is told by its headers. Pure.

A page in the operator's browser reaches servers on the operator's machine: by a form, by a script's simple request, in a frame, or
under a name that was rebound to 127.0.0.1. Browsers say where such a request comes from, and pages cannot change what they say.
"""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlsplit

from weightcast.quoted import NAME_CHARACTERS, quoted

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Headers(Protocol):
    """What starlette's headers and those of http.server have in common: names in any case."""

    def get(self, name: str, /) -> str | None: ...


def foreign_page(method: str, headers: Headers) -> str | None:
    """Why the request is one of another site's page, None for any other. A page of another port is another site's.

    A link that is followed to a page of ours is no such request: it is a navigation of the whole window by GET.
    """
    origin = headers.get("origin")
    if origin is not None and (
        authority_of(origin) is None or authority_of(origin) != authority_of(headers.get("host"))
    ):
        return f"pages of other sites are refused, and the origin is {quoted(origin, NAME_CHARACTERS)!r}"
    site = headers.get("sec-fetch-site")
    followed = (
        method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )
    if site is not None and site not in ("same-origin", "none") and not followed:
        return f"pages of other sites are refused, and this request is {quoted(site, NAME_CHARACTERS)!r}"
    return None


def authority_of(value: str | None) -> tuple[str, int] | None:
    """Host and port of an origin, or of a Host header (which is taken for one of http); None for what names no host."""
    rest = value.partition("://")[2] or value if value else ""
    if value is None or any(sign in "/@?#\\" for sign in rest):
        return None
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None
