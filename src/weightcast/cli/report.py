"""weightcast report: a page, in one file, of the rounds in a publisher's log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightcast.cli.shared import console, reported_errors


def command(
    log: Annotated[Path, typer.Argument(help="A publisher's log (Publisher(log=...)).")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Write a page that shows a run's rounds, phase by phase; it needs no network and can be sent to others."""
    from weightcast.errors import InvalidInput
    from weightcast.report.page import Chart, Page, write_page
    from weightcast.report.roundlog import read_rounds
    from weightcast.report.rounds import stalls

    with reported_errors():
        try:
            reports = list(read_rounds(log))
        except OSError as error:
            raise InvalidInput(f"the log cannot be read: {error}", field="log") from None
        if not reports:
            raise InvalidInput(f"{log} holds no rounds", field="log")
        times = {"publish": [report.total_s * 1e3 for report in reports]}
        charts = [
            Chart(title="Publish", unit="ms", series=times, x_label="round", wide=True),
            Chart(title="Stall of each commit", unit="ms", series=stalls(reports), x_label="round", wide=True),
        ]
        try:
            path = write_page(out, Page(title=log.name, charts=charts, reports=reports))
        except OSError as error:
            raise InvalidInput(f"the page cannot be written: {error}", field="out") from None
    console().print(f"{len(reports)} rounds: {path}", highlight=False, markup=False, soft_wrap=True)
