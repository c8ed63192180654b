"""URLs of servers on unix sockets: ``unix:///absolute/path``, percent-encoded where a URL needs that. Pure."""

from __future__ import annotations

import os
from urllib.parse import quote, unquote_to_bytes

SCHEME = "unix"
MAX_PATH_NBYTES = 107
"""What an address of the kernel's has room for."""


def url_of_path(path: str) -> str:
    """The URL of the socket at an absolute path."""
    return f"{SCHEME}://{quote(os.fsencode(path))}"


def path_of_url(url: str) -> str | None:
    """The path that a URL of this scheme names; None where it names none that a socket can have."""
    head = f"{SCHEME}://"
    if url[: len(head)].lower() != head or any(sign in url for sign in "?#"):
        return None
    path = unquote_to_bytes(url[len(head) :]).rstrip(b"/")
    usable = path.startswith(b"/") and b"\0" not in path and len(path) <= MAX_PATH_NBYTES
    return os.fsdecode(path) if usable else None
