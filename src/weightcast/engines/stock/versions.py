"""Which versions of a stock engine an adapter works with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightcast.errors import Unsupported


@dataclass(frozen=True, slots=True)
class VersionRange:
    """From the first to the last release of ``product`` that is supported, both as numbers of one length."""

    product: str
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def hint(self) -> str:
        return f"weightcast works with {self.product} {_text(self.first)} to {_text(self.last)}"

    def check(self, version: str) -> tuple[int, ...]:
        """The numbers of a supported version; Unsupported names the range.

        A development build counts as the release that it leads to. One that nobody numbered ("dev", "0.0.0...") passes as the
        last supported: what it is shows when it is used.
        """
        found = re.match(r"\.".join([r"(\d+)"] * len(self.first)), version)
        if found is None or version.startswith("0.0"):
            return self.last
        numbers = tuple(int(part) for part in found.groups())
        if not self.first <= numbers <= self.last:
            raise Unsupported(f"{self.product} {version} is not supported", hint=self.hint)
        return numbers


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
