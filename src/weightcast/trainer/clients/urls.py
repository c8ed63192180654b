"""URLs of engines: what can never be reached is refused by name before anything is sent."""

from __future__ import annotations

from urllib.parse import urlsplit

from weightcast.errors import InvalidInput


def host_of(url: str) -> str:
    """The host that an engine's URL names; raises InvalidInput for anything but http(s)://host[:port][/path].

    Checked as a whole: a port out of range, a bracket left open and a label too long for DNS are told apart by nobody later,
    they only end calls in the middle with errors of other libraries.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        usable = bool(host) and parts.scheme in ("http", "https") and (port is None or port > 0)
        (host or "").encode("idna")
    except ValueError as error:  # also a UnicodeError of the codec
        raise InvalidInput(f"an engine is http://host:port, not {url!r}: {error}", field="engines") from None
    if not usable or host is None or not url.isascii() or any(sign.isspace() or not sign.isprintable() for sign in url):
        raise InvalidInput(f"an engine is http://host:port, not {url!r}", field="engines")
    return host
