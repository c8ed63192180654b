"""Rounds as pages show them: one record for what a trainer reports and for what an engine says of its orders. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightcast.manifest.names import number_of, shown
from weightcast.quoted import NAME_CHARACTERS, TEXT_CHARACTERS, quoted
from weightcast.report.model import EngineReport, Phase, Report, format_bytes
from weightcast.report.tables import Cell, Table

KEPT = 1000
"""Rounds on a page; of a longer run the newest."""
SHOWN_NAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRound:
    """One ``publish()``, or one order that an engine carried out. ``at`` is in seconds since 1970.

    What only a trainer knows is None in the record of an engine.
    """

    action: str
    epoch: int
    round: int
    version: str
    seconds: float
    phases: tuple[Phase, ...] = ()
    at: float | None = None
    error: str | None = None
    proven: bool | None = None
    """Whether every engine proved the digest that was published."""
    digest: str | None = None
    mode: str | None = None
    nbytes: int | None = None
    engines: str | None = None
    """How many of the engines are well."""


def in_sequence(seconds: Mapping[str, float]) -> tuple[Phase, ...]:
    """Phases that follow each other without a gap, from their lengths."""
    phases: list[Phase] = []
    for name, value in seconds.items():
        phases.append(Phase(name=name, start_s=phases[-1].end_s if phases else 0.0, seconds=value))
    return tuple(phases)


def round_of(report: Report) -> PageRound:
    """A report as one line of a page."""
    well = sum(engine.ok for engine in report.engines)
    errors = [f"{engine.name}: {engine.error}" for engine in report.engines if engine.error]
    failed = report.outcome != "committed" or errors
    return PageRound(
        action="publish",
        epoch=report.epoch,
        round=report.round,
        version=report.version,
        seconds=report.total_s,
        phases=report.phases,
        at=report.at,
        error=quoted("; ".join([report.outcome, *errors]), TEXT_CHARACTERS) if failed else None,
        proven=report.digests_match,
        digest=report.digest,
        mode=report.mode,
        nbytes=report.nbytes,
        engines=f"{well} of {len(report.engines)}",
    )


def trainer_of(reports: Sequence[Report]) -> dict[str, Any]:
    """The trainer as one of a page's engines: its rounds, and what it published last."""
    left_out = reports[-1].unused if reports else ()
    notes = []
    if len(reports) > KEPT:
        notes.append(f"The newest {KEPT} of {len(reports)} rounds.")
    if left_out:
        notes.append(
            f"{number_of(len(left_out), 'tensor')} left out of the last round: {shown(left_out, SHOWN_NAMES)}."
        )
    served = _served(reports)
    return {
        "name": "trainer",
        "role": "trainer",
        "status": {"weight_version": served, "ready": True} if served else None,
        "note": " ".join(notes),
        "rounds": [round_of(report) for report in reports[-KEPT:]],
    }


def _served(reports: Sequence[Report]) -> str | None:
    return next((report.version for report in reversed(reports) if report.outcome == "committed"), None)


def facts_of(reports: Sequence[Report]) -> dict[str, str | Cell]:
    """A run in four figures."""
    if not reports:
        return {}
    times = sorted(report.total_s for report in reports)
    proven = sum(report.digests_match for report in reports)
    return {
        "Served version": _served(reports) or "none",
        "Rounds proven by digest": Cell(
            text=f"{proven} of {len(reports)}", state="bad" if proven < len(reports) else ""
        ),
        "Publish, median": f"{times[len(times) // 2] * 1e3:.1f} ms",
        "Bytes per round": format_bytes(max(report.nbytes for report in reports)),
    }


def stalls(reports: Sequence[Report]) -> dict[str, list[float]]:
    """How long each engine's commit held up its requests, in milliseconds by round; not a number where there was none."""
    names = dict.fromkeys(engine.name for report in reports for engine in report.engines)
    series: dict[str, list[float]] = {name: [] for name in names}
    for report in reports:
        stalled = {engine.name: _stall(engine) for engine in report.engines}
        for name, values in series.items():
            values.append(stalled.get(name, float("nan")))
    return series


def _stall(engine: EngineReport) -> float:
    if not engine.phases:
        return float("nan")
    return (max(phase.end_s for phase in engine.phases) - min(phase.start_s for phase in engine.phases)) * 1e3


def engines_table(report: Report) -> Table:
    """What each worker of each engine did in a round, and what its engine serves after it."""
    rows: list[list[str | Cell]] = []
    for engine in report.engines:
        state = Cell(text="ok", state="good") if engine.ok else Cell(text=f"failed: {engine.error}", state="bad")
        for rank, transport, reason in [(str(w.rank), w.transport, w.reason) for w in engine.workers] or [("", "", "")]:
            rows.append(
                [quoted(engine.name, NAME_CHARACTERS), engine.kind, rank, transport, reason, engine.version, state]
            )
    columns = ("engine", "kind", "worker", "transport", "why this one", "serves", "state")
    return Table(title="Engines after the last round", columns=columns, rows=rows)
