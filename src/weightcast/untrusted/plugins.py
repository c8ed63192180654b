"""Plug-ins: which installed packages may add transports and backends. Importing one runs its code.

Packages add to weightcast through entry points (groups ``weightcast.transports`` and ``weightcast.weight_transfer_engines``).
The variable WEIGHTCAST_PLUGINS restricts them, as VLLM_PLUGINS does in vLLM: a list of names with commas between them; empty for none,
unset for all. What is weightcast's own is not concerned, and no package can take the name of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

VARIABLE = "WEIGHTCAST_PLUGINS"


def entry_points_of(group: str, points: Iterable[EntryPoint] | None = None) -> dict[str, EntryPoint]:
    """The entry points of a group by name, allowed or not; weightcast's own first where two have one name."""
    found = entry_points(group=group) if points is None else points
    return {point.name: point for point in sorted(found, key=is_own)}


def is_own(point: EntryPoint) -> bool:
    """Whether it is part of weightcast itself."""
    return point.value.partition(":")[0].split(".")[0] == "weightcast"


def refusal(point: EntryPoint) -> str | None:
    """Why an entry point must not be imported; None when it may be."""
    allowed = os.environ.get(VARIABLE)
    if allowed is None or is_own(point) or point.name in {name.strip() for name in allowed.split(",")}:
        return None
    return f"{point.value} is another package's, and the variable {VARIABLE} does not name {point.name!r}"
