"""A mistake of a user's: how it is made, how it is told, and that doing as the hint says mends it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from weightcast.errors import WeightcastError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """``said`` and ``hint`` are patterns. ``follow`` does as the hint says, and has to work; None where no test can do so."""

    make: Callable[[], object]
    error: type[WeightcastError]
    said: str
    hint: str
    follow: Callable[[], object] | None = None

    def play(self) -> None:
        """Make the mistake, look at error and hint, and follow the hint."""
        with pytest.raises(self.error, match=self.said) as caught:
            self.make()
        told = caught.value.hint or ""
        assert re.search(self.hint, told), f"{caught.value.message}: {told}"
        assert told in str(caught.value)
        if self.follow is not None:
            self.follow()
