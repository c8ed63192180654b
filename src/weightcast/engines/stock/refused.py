"""Settings of a stock engine that weights cannot be transferred with, refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weightcast.engines.stock.versions import VersionRange
from weightcast.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Refused:
    """A setting that weights cannot be transferred with, unless it has its harmless value."""

    setting: str
    """Where it is, from the engine's configuration on: names with dots between them."""
    harmless: Any
    what: str
    hint: str


def refuse(config: Any, refused: Iterable[Refused], versions: VersionRange) -> None:
    """Raise Unsupported for the first setting whose value is not the harmless one."""
    for one in refused:
        if setting_of(config, one.setting, versions) != one.harmless:
            raise Unsupported(f"{one.what} not supported with weight transfer ({one.setting})", hint=one.hint)


def setting_of(config: Any, setting: str, versions: VersionRange) -> Any:
    """Return the value of a setting by its dotted name. Unsupported where the engine has no such setting, because nobody knows then
    what became of the setting."""
    value = config
    for name in setting.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:
            raise Unsupported(
                f"this {versions.product} has no setting {setting}, so weightcast cannot tell whether it may transfer weights",
                hint=versions.hint,
            ) from None
    return value
