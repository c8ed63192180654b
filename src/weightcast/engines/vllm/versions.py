"""Which vLLM versions the plug-in works with."""

from __future__ import annotations

import re

from weightcast.errors import Unsupported

FIRST, LAST = (0, 26), (0, 33)


def check_version(version: str) -> tuple[int, int]:
    """(major, minor) of a supported vLLM; Unsupported names the range.

    A development build counts as the release that it leads to. One that nobody numbered ("dev", "0.0.0...") passes as the
    last supported: what it is shows when it is used.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or version.startswith("0.0"):
        return LAST
    number = (int(found[1]), int(found[2]))
    if not FIRST <= number <= LAST:
        raise Unsupported(
            f"vLLM {version} is not supported",
            hint=f"weightcast works with vLLM {_text(FIRST)} to {_text(LAST)}",
        )
    return number


def _text(number: tuple[int, int]) -> str:
    return f"{number[0]}.{number[1]}"
