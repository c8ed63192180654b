"""Which vLLM versions the plug-in works with."""

from __future__ import annotations

from weightcast.engines.stock.versions import VersionRange

SUPPORTED = VersionRange("vLLM", (0, 26), (0, 33))


def check_version(version: str) -> tuple[int, ...]:
    """(major, minor) of a supported vLLM; Unsupported names the range."""
    return SUPPORTED.check(version)
