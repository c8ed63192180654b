"""The report page: one self-contained HTML file about a run's rounds; needs no network and, but for hovering, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.manifest.names import shown
from weightcast.report.model import Report, format_bytes
from weightcast.report.svg import line_chart, phase_colours, timeline
from weightcast.untrusted.written import write_whole

SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the page shows. ``series`` are lines over steps 1, 2, ... (the first is the main one), ``facts`` the tiles on top."""

    title: str
    summary: str = ""
    reports: Sequence[Report] = ()
    series_title: str = "Reward"
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.series.values()}
        if len(lengths) > 1:
            raise InvalidInput(f"series of different lengths: {sorted(lengths)}", field="series")


def write_page(path: str | Path, page: Page) -> Path:
    """Write the page, whole or not at all, and return its path."""
    return write_whole(Path(path), render(page))


def render(page: Page) -> str:
    """The page as HTML text."""
    body = [
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.summary)}</p></header>",
        _tiles({**page.facts, **_round_facts(page.reports)}),
    ]
    if any(page.series.values()):
        body.append(_chart(page))
    if page.reports:
        body.append(_timeline(page.reports))
        body.append(_engines(page.reports))
        body.append(_rounds(page.reports))
    assets = files("weightcast.report").joinpath("assets")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(page.title)}</title><style>{assets.joinpath('page.css').read_text(encoding='utf-8')}</style>"
        f'</head><body><main>{"".join(body)}</main><div id="tip" hidden></div>'
        f"<script>{assets.joinpath('page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _round_facts(reports: Sequence[Report]) -> dict[str, str]:
    if not reports:
        return {}
    times = sorted(report.total_s for report in reports)
    proven = sum(report.digests_match for report in reports)
    return {
        "Served version": next((r.version for r in reversed(reports) if r.outcome == "committed"), "none"),
        "Rounds proven by digest": f"{proven} of {len(reports)}",
        "Publish, median": f"{times[len(times) // 2] * 1e3:.1f} ms",
        "Bytes per round": format_bytes(max(report.nbytes for report in reports)),
    }


def _tiles(facts: Mapping[str, str]) -> str:
    tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _section(title: str, content: str, note: str = "") -> str:
    extra = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{extra}{content}</section>"


def _chart(page: Page) -> str:
    count = max(len(values) for values in page.series.values())
    tips = []
    for step in range(count):
        lines = [f"step {step + 1}"]
        lines += [f"{name}: {values[step]:.4g}" for name, values in page.series.items()]
        tips.append("\n".join(lines))
    keys = "".join(f'<li><i class="k{number % 8}"></i>{escape(name)}</li>' for number, name in enumerate(page.series))
    legend = f'<ul class="legend">{keys}</ul>' if len(page.series) > 1 else ""
    return _section(page.series_title, legend + line_chart(page.series, tips, x_label="step"))


def _timeline(reports: Sequence[Report]) -> str:
    keys = "".join(
        f'<li><i class="b{colour}"></i>{escape(name)}</li>' for name, colour in phase_colours(reports).items()
    )
    note = "Each row is one publish(), labelled with its version number. Point at a segment for its times."
    return _section("Rounds, phase by phase", f'<ul class="legend">{keys}</ul>{timeline(reports)}', note)


def _engines(reports: Sequence[Report]) -> str:
    rows = []
    for engine in reports[-1].engines:
        for worker in engine.workers:
            rows.append(
                _cells(
                    engine.name,
                    engine.kind,
                    str(worker.rank),
                    worker.transport,
                    worker.reason,
                    engine.version,
                    "ok" if engine.ok else f"failed: {engine.error}",
                )
            )
    head = _cells("engine", "kind", "worker", "transport", "why this one", "serves", "state", tag="th")
    return _section("Engines after the last round", _table(head, rows))


def _rounds(reports: Sequence[Report]) -> str:
    rows = []
    for report in reports:
        mark = '<b class="ok">✓</b>' if report.digests_match else '<b class="bad">✗</b>'
        digest = f'<td title="{escape(report.digest)}">{mark} <code>{escape(report.digest[:16])}</code></td>'
        rows.append(
            _cells(report.version)
            + digest
            + _cells(report.outcome, report.mode)
            + _cells(
                str(report.epoch),
                str(report.round),
                format_bytes(report.nbytes),
                f"{report.total_s * 1e3:.1f} ms",
                f"{report.rate_gb_s:.2f} GB/s",
                f"{sum(engine.ok for engine in report.engines)} of {len(report.engines)}",
                classes="num",
            )
        )
    head = _cells("version", "digest", "outcome", "mode", tag="th") + _cells(
        "epoch", "round", "bytes", "time", "rate", "engines well", tag="th", classes="num"
    )
    left_out = reports[-1].unused if reports else ()
    but = f" {len(left_out)} tensors were left out of the last round: {shown(left_out, SHOWN)}." if left_out else ""
    return _section("All rounds", _table(head, rows), f"✓: every engine's live weights have the published digest.{but}")


def _cells(*texts: str, tag: str = "td", classes: str = "") -> str:
    attribute = f' class="{classes}"' if classes else ""
    return "".join(f"<{tag}{attribute}>{escape(text)}</{tag}>" for text in texts)


def _table(head: str, rows: Sequence[str]) -> str:
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
