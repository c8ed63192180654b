"""The matrix as a table: for the terminal, and as markdown for a document between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tests.trials.matrix.results import Result

BEGIN, END = "<!-- matrix: made by `make matrix`, not by hand -->", "<!-- end of the matrix -->"
MARKS = {"passed": "✓", "failed": "✗ broken", "hung": "✗ hung", "skipped": "not played"}
UNJUDGED = "not judged"
"""What a skipped cell's text begins with when it was played, and its end says nothing about the promises."""
STYLES = {"passed": "green", "failed": "bold red", "hung": "bold red", "skipped": "yellow"}


def columns_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Transport and mode of each column, in the order in which they appear."""
    return list(dict.fromkeys((result.transport, result.mode) for result in results))


def _mark(result: Result | None) -> str:
    if result is None:
        return ""
    if result.state == "skipped" and result.text.startswith(UNJUDGED):
        return UNJUDGED
    seconds = f" {result.seconds:.1f} s" if result.seconds is not None else ""
    return MARKS[result.state] + seconds


def _outcome(row: Sequence[Result]) -> str:
    """What comes of the fault; where transports or modes differ, each wording once."""
    texts = dict.fromkeys(result.text for result in row if result.state == "passed")
    return " / ".join(text for text in texts if text != "passed") or "-"


def _rows(results: Sequence[Result]) -> dict[str, dict[tuple[str, str], Result]]:
    rows: dict[str, dict[tuple[str, str], Result]] = {}
    for result in results:
        rows.setdefault(result.fault, {})[result.transport, result.mode] = result
    return rows


def rich_table(results: Sequence[Result]) -> Table:
    """One row a fault, one column for each transport and mode."""
    columns = columns_of(results)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("fault")
    for transport, mode in columns:
        table.add_column(f"{transport}\n{mode}")
    table.add_column("what comes of it", overflow="fold")
    for fault, row in _rows(results).items():
        cells = [row.get(column) for column in columns]
        marks = [Text(_mark(cell), STYLES[cell.state]) if cell else Text() for cell in cells]
        table.add_row(fault, *marks, _outcome(list(row.values())))
    return table


def markdown(results: Sequence[Result]) -> str:
    """The same as a markdown table."""
    columns = columns_of(results)
    head = ["fault", *(f"{transport} {mode}" for transport, mode in columns), "what comes of it"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for fault, row in _rows(results).items():
        marks = [_mark(row.get(column)) for column in columns]
        lines.append(f"| {fault} | {' | '.join(marks)} | {_outcome(list(row.values()))} |")
    return "\n".join(lines) + "\n"


def write_between_markers(path: Path, table: str) -> None:
    """Put the table into a document; ValueError when the document has no place for it."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")
