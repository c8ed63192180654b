"""Charts as inline SVG text. Every text that comes from outside passes ``escape``; colours are CSS classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from weightcast.report.model import Report, format_bytes

WIDTH = 960
LEFT, RIGHT = 62, 16
NUM_COLOURS = 8


def phase_colours(reports: Sequence[Report]) -> dict[str, int]:
    """A colour number for each phase name, in the order in which phases first appear."""
    names: dict[str, int] = {}
    for report in reports:
        for name in report.phase_seconds():
            names.setdefault(name, len(names) % NUM_COLOURS)
    return names


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover [low, high]; the first is at most ``low``, the last at least ``high``."""
    if not high > low:
        high = low + 1.0
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def line_chart(series: Mapping[str, Sequence[float]], tips: Sequence[str], *, x_label: str) -> str:
    """Lines over steps 1, 2, ...; the first series is drawn strongest last. ``tips[i]`` is shown when step i is pointed at."""
    height, top, bottom = 300, 12, 34
    count = max(len(values) for values in series.values())
    every = [value for values in series.values() for value in values]
    marks = ticks(min(every), max(every))
    span = marks[-1] - marks[0]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step / max(1, count - 1))

    def y(value: float) -> float:
        return top + (height - top - bottom) * (marks[-1] - value) / span

    parts = [_open(height, "chart")]
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y(mark) + 4:.1f}">{mark:.4g}</text>')
    for mark in (1.0, *ticks(1, count, 8)):
        if mark == int(mark) and mark in range(1, count + 1) and not 1 < mark < count / 20:
            parts.append(f'<text class="tick mid" x="{x(mark - 1):.1f}" y="{height - 14}">{mark:g}</text>')
    parts.append(f'<text class="tick end" x="{WIDTH - RIGHT}" y="{height - 1}">{escape(x_label)}</text>')
    for number, values in reversed(list(enumerate(series.values()))):
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
        parts.append(f'<polyline class="line l{number % NUM_COLOURS}" points="{points}"/>')
    parts.append(f'<line class="cursor" y1="{top}" y2="{height - bottom}"/>')
    half = (WIDTH - LEFT - RIGHT) / max(1, count - 1) / 2
    for i, tip in enumerate(tips):
        parts.append(
            f'<rect class="hit" data-tip="{escape(tip)}" data-x="{x(i):.1f}" x="{x(i) - half:.1f}" y="{top}" '
            f'width="{2 * half:.2f}" height="{height - top - bottom}"/>'
        )
    return "".join(parts) + "</svg>"


def timeline(reports: Sequence[Report]) -> str:
    """One row per round: its phases where they lie on the clock of that publish()."""
    row, top, bottom = 15, 8, 40
    colours = phase_colours(reports)
    height = top + row * len(reports) + bottom
    ends = [max([report.total_s, *(phase.end_s for phase in report.phases)]) for report in reports]
    marks = [mark for mark in ticks(0.0, _typical(ends) * 1e3, 8) if mark >= 0]
    scale = (WIDTH - LEFT - RIGHT) / (marks[-1] / 1e3)
    parts = [_open(height, "chart timeline")]
    for mark in marks:
        x = LEFT + mark / 1e3 * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom + 4}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{height - bottom + 18}">{mark:g}</text>')
    parts.append(
        f'<text class="tick end" x="{WIDTH - RIGHT}" y="{height - 4}">milliseconds since publish() began</text>'
    )
    for number, report in enumerate(reports):
        y = top + row * number
        if number % 5 == 0 or len(reports) <= 20:
            parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{y + 11}">{report.number}</text>')
        parts.append(_row(report, y, row, scale, colours))
    return "".join(parts) + "</svg>"


def _row(report: Report, y: float, height: float, scale: float, colours: Mapping[str, int]) -> str:
    edge = WIDTH - RIGHT
    parts = [f'<rect class="lane" x="{LEFT}" y="{y}" width="{edge - LEFT}" height="{height}"/>']
    if report.outcome != "committed":
        parts.append(f'<text class="aborted" x="{LEFT - 14}" y="{y + 11}">✗</text>')
    for phase in report.phases:
        x = LEFT + phase.start_s * scale
        if x >= edge:
            continue
        # One pixel of each segment's end stays free, so that neighbours can be told apart without their colour.
        width = max(0.75, min(phase.seconds * scale, edge - x) - 1)
        tip = (
            f"{report.version} · {phase.name}\n{phase.seconds * 1e3:.2f} ms, from {phase.start_s * 1e3:.2f} ms\n"
            f"round {report.round}, {report.mode}, {report.outcome}\n"
            f"{format_bytes(report.nbytes)} in {report.total_s * 1e3:.1f} ms"
        )
        parts.append(
            f'<rect class="phase c{colours[phase.name]}" data-tip="{escape(tip)}" x="{x:.2f}" y="{y + 2}" '
            f'width="{width:.2f}" height="{height - 4}" rx="1.5"/>'
        )
    if report.total_s * scale > edge - LEFT:
        # Light letters on the bar itself: the row goes on past the axis.
        parts.append(f'<text class="beyond end" x="{edge - 6}" y="{y + 11.5}">{report.total_s * 1e3:.1f} ms ▸</text>')
    return "".join(parts)


def _typical(ends: Sequence[float]) -> float:
    """What the time axis spans: all rounds, unless a few (the first connects and compiles) dwarf the rest."""
    ordered = sorted(ends)
    most = ordered[int((len(ordered) - 1) * 0.9)] * 1.25
    return max(min(ordered[-1], most) if len(ordered) >= 10 else ordered[-1], 1e-6)


def _open(height: float, classes: str) -> str:
    return f'<svg class="{classes}" viewBox="0 0 {WIDTH} {height}" role="img" preserveAspectRatio="xMidYMid meet">'
