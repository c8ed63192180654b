"""Plug points: the places in other libraries where weightcast goes in, looked up by name and refused by name where they are missing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from weightcast.errors import Unsupported


def plug_point(place: str, *, package: str, wanted: str, members: Iterable[str] = ()) -> Any:
    """The object at ``module:name`` of an installed package. Unsupported where the package, the object or one of its members is missing.

    Args:
        wanted: the requirement that has the plug point, such as ``trl>=1.16``.
        members: attributes that the object must have.
    """
    module_name, _, name = place.partition(":")
    try:
        found = getattr(import_module(module_name), name)
        missing = next((member for member in members if not hasattr(found, member)), None)
    except (ImportError, AttributeError) as error:
        raise _unsupported(place, package, wanted, str(error)) from error
    if missing is not None:
        raise _unsupported(f"{place}.{missing}", package, wanted, "")
    return found


def put(place: str, value: object) -> None:
    """Put something of our own at ``module:name``, which ``plug_point`` has found there."""
    module, _, name = place.partition(":")
    setattr(import_module(module), name, value)


def _unsupported(place: str, package: str, wanted: str, why: str) -> Unsupported:
    hint = f"pip install '{wanted}'"
    try:
        installed = version(package)
    except PackageNotFoundError:
        return Unsupported(f"{package} is not installed ({why or place})", hint=hint)
    return Unsupported(f"{package} {installed} has no {place}" + (f" ({why})" if why else ""), hint=hint)
