"""Written: files that appear whole under their name, or not at all, whatever another user has put there before."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write ``text`` under ``path`` in one step and return the path; OSError when that is not possible.

    The text goes to a new file of a name that nobody can guess, which is never opened through a link, and takes the path's place when it
    is complete. A link that stands at ``path`` is replaced, not followed.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(partial, flags, 0o644)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            stream.write(text)
        return partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
