"""The page: one static HTML file that draws a JSON document, for finished runs and for what is still running.

The file is the same for a run's report, the demo and a fleet that is watched; the documents differ. The document is embedded, and a
live page asks its server for the newest rounds again and again. Load-bearing properties:

- Texts of engines and peers are hostile. The document is embedded as JSON in which no markup can begin, and the script puts every text
  in as text.
- The page needs no network: its policy admits its own script and style by their digests, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from weightcast.errors import InvalidInput
from weightcast.report.colours import PHASE_COLOURS
from weightcast.report.model import Report
from weightcast.report.rounds import engines_table, facts_of, trainer_of
from weightcast.report.tables import Cell, Table
from weightcast.untrusted.written import write_whole

PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""What a server sends with the page: no other page may show it in a frame."""

_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}
"""Signs that end a script, begin a comment or an entity, or end a line in old JavaScript."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over steps 1, 2, ... (the first series is the main one), or with ``kind="shares"`` each step's shares of their sum.

    Values that are not finite are gaps.
    """

    title: str
    series: Mapping[str, Sequence[float]]
    kind: Literal["lines", "shares"] = "lines"
    unit: str = ""
    note: str = ""
    wide: bool = False
    """Whether the chart has a line of the page for itself."""
    x_label: str = "step"

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.series.values()}
        if len(lengths) > 1:
            raise InvalidInput(f"{self.title}: series of different lengths: {sorted(lengths)}", field="series")

    @property
    def has_values(self) -> bool:
        """Whether there is anything to draw."""
        return any(math.isfinite(value) for values in self.series.values() for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows. ``facts`` are the tiles on top, ``tables`` stand above the rounds and ``details`` below them, ``live`` is the
    path at which the page asks for newer rounds."""

    title: str
    summary: str = ""
    facts: Mapping[str, str | Cell] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()
    reports: Sequence[Report] = ()
    live: str | None = None

    def document(self) -> dict[str, Any]:
        """The page as the JSON document that its script draws."""
        last = self.reports[-1:]
        return {
            "title": self.title,
            "summary": self.summary,
            "facts": {**self.facts, **facts_of(self.reports)},
            "charts": [chart for chart in self.charts if chart.has_values],
            "tables": self.tables,
            "details": [*map(engines_table, last), *self.details],
            "engines": [trainer_of(self.reports)] if self.reports else [],
            "live": self.live,
            "colours": PHASE_COLOURS,
        }


LIVE_PAGE = Page(title="weightcast", summary="asking …", live="weightcast/rounds")
"""The page of a server or a fleet; served at any path whose sibling ``weightcast/rounds`` answers."""


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page, whole or not at all, and return its path."""
    return write_whole(Path(path), render(page))


def render(page: Page) -> str:
    """The page as HTML text."""
    style, script = _asset("page.css"), _asset("charts.js") + _asset("page.js")
    connect = "'self'" if page.live else "'none'"
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"<title>{escape(page.title)}</title><style>{style}</style></head>"
        "<body><main><noscript>This page is drawn by its own script, which needs no network.</noscript></main>"
        f'<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="document">{embedded(page.document())}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def embedded(document: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: no sign in it can end the element. Numbers that are not finite are null."""
    return msgspec.json.encode(document).decode().translate(_ESCAPES)


@cache
def _asset(name: str) -> str:
    return files("weightcast.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
