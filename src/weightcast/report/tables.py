"""Tables of texts for a page: columns, rows, and cells that say whether things went well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weightcast.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text, and whether it tells of success ("good") or of failure ("bad")."""

    text: str
    state: Literal["", "good", "bad"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of texts under named columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise InvalidInput(f"{self.title}: every row needs {len(self.columns)} cells", field="rows")
