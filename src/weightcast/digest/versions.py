"""Names of versions: a number, and a short name of form and content. Pure."""

from __future__ import annotations

import hashlib

from weightcast.manifest import Manifest

INITIAL_VERSION = "default"
"""What an engine serves that has never met a trainer."""
MAX_DIGITS = 15
"""Of a version's number; a longer one is a label that happens to look like it."""


def version_name(number: int, manifest: Manifest, digest: int) -> str:
    """``n-<12 hex>``: a version number and a name of its form and content."""
    content = hashlib.sha256(f"{manifest.digest}:{digest:016x}".encode()).hexdigest()
    return f"{number}-{content[:12]}"


def version_number(version: str) -> int:
    """The number in a version's name; 0 for a label that is none."""
    head = version.partition("-")[0]
    return int(head) if len(head) <= MAX_DIGITS and head.isascii() and head.isdigit() else 0
