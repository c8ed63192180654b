"""What plays say: a Finding, or AssertionError for a broken promise."""

from __future__ import annotations

from dataclasses import dataclass


def expect(condition: object, text: str) -> None:
    """A promise of the matrix; AssertionError says which one is broken."""
    if not condition:
        raise AssertionError(text)


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a fault, in words; ``seconds`` is how long the publish took that met it, where one did."""

    text: str
    seconds: float | None = None

    def __str__(self) -> str:
        return self.text if self.seconds is None else f"{self.text} after {self.seconds:.1f} s"
