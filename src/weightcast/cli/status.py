"""weightcast status: what engines serve, as a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weightcast.cli.shared import (
    JsonOption,
    TokenFileOption,
    TokenOption,
    chosen_token,
    console,
    error_fields,
    print_json,
    print_table,
    reported_errors,
)
from weightcast.deadline import MOST_S
from weightcast.errors import WeightcastError
from weightcast.quoted import quoted

if TYPE_CHECKING:
    from weightcast.trainer.clients.http import HttpEngineClient

Row = Mapping[str, Any] | WeightcastError
Show = Callable[[list[Row]], None]
CELL_CHARACTERS = 400
COLUMNS = ("engine", "model", "version", "digest", "state", "running", "waiting", "syncs")
COUNTS = {"running": "num_running", "waiting": "num_waiting", "syncs": "num_syncs"}


def command(
    urls: Annotated[list[str], typer.Argument(help="URLs of engines' servers.")],
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Ask again and again until interrupted. Into a file: a line for each change."),
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=MOST_S, help="Seconds between two questions with --watch.")
    ] = 1.0,
    timeout: Annotated[float, typer.Option(min=0.001, max=MOST_S, help="Deadline of one question, in seconds.")] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Show what each engine serves. Exit status 1 if one cannot be reached."""
    from weightcast.trainer.clients.http import HttpEngineClient

    with reported_errors(as_json=as_json):
        given = chosen_token(token, token_file)
        clients = [HttpEngineClient(url, token=given) for url in urls]
        try:
            rows = ask_all(clients, timeout)
            if as_json:
                show: Show = lambda rows: print_json(status_fields(clients, rows))  # noqa: E731
                rows = _repeat(clients, rows, show, interval, timeout) if watch else _once(rows, show)
            elif watch:
                rows = _watch(clients, rows, interval, timeout)
            else:
                print_table(console(), status_table(clients, rows))
        finally:
            for client in clients:
                client.close()
    if any(isinstance(row, WeightcastError) for row in rows):
        raise typer.Exit(1)


def _once(rows: list[Row], show: Show) -> list[Row]:
    show(rows)
    return rows


def _repeat(
    clients: Sequence[HttpEngineClient], rows: list[Row], show: Show, interval: float, timeout: float
) -> list[Row]:
    """Show until interrupted; returns what was seen last."""
    try:
        while True:
            show(rows)
            time.sleep(interval)
            rows = ask_all(clients, timeout)
    except KeyboardInterrupt:
        return rows


def _watch(clients: Sequence[HttpEngineClient], rows: list[Row], interval: float, timeout: float) -> list[Row]:
    """A table that follows what engines serve; where there is no terminal to draw it in, a line for each change."""
    out = console()
    if not out.is_terminal:
        return _repeat(clients, rows, Changes(clients), interval, timeout)
    with Live(status_table(clients, rows), console=out, auto_refresh=False) as live:
        return _repeat(
            clients, rows, lambda rows: live.update(status_table(clients, rows), refresh=True), interval, timeout
        )


class Changes:
    """Prints a line, with the time, for each engine that says something else than before."""

    def __init__(self, clients: Sequence[HttpEngineClient]) -> None:
        self._clients = clients
        self._said: dict[str, list[str]] = {}

    def __call__(self, rows: Sequence[Row]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for client, row in zip(self._clients, rows, strict=True):
            cells = [str(cell) for cell in _cells(row)]
            if self._said.get(client.name) != cells:
                self._said[client.name] = cells
                said = [f"{name} {cell}" for name, cell in zip(COLUMNS[1:], cells, strict=True) if cell]
                typer.echo(f"{now} {client.name}: {', '.join(said)}")


def ask_all(clients: Sequence[HttpEngineClient], timeout_s: float) -> list[Row]:
    """The status of each engine, asked at the same time; an error takes the place of an answer that did not come."""
    from weightcast.deadline import Deadline

    def ask(client: HttpEngineClient) -> Row:
        try:
            return client.status(Deadline(timeout_s))
        except WeightcastError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(16, len(clients))) as pool:
        return list(pool.map(ask, clients))


def status_fields(clients: Sequence[HttpEngineClient], rows: Sequence[Row]) -> dict[str, Any]:
    """What each engine says, as JSON has it: its whole status, or the error that came instead."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "engines": [
            {"engine": client.name, "status": None, "error": error_fields(row)}
            if isinstance(row, WeightcastError)
            else {"engine": client.name, "status": row, "error": None}
            for client, row in zip(clients, rows, strict=True)
        ],
    }


def status_table(clients: Sequence[HttpEngineClient], rows: Sequence[Row]) -> Table:
    """One line per engine."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in COUNTS else "left", overflow="fold")
    for client, row in zip(clients, rows, strict=True):
        table.add_row(client.name, *_cells(row))
    return table


def _cells(row: Row) -> list[Text]:
    if isinstance(row, WeightcastError):
        error = _cell(f"{type(row).__name__}: {row.message}{f'. {row.hint}' if row.hint else ''}", "red")
        return [Text(""), Text(""), Text(""), error, *(Text("") for _ in COUNTS)]
    return [
        *map(_cell, (row.get("model"), _versions(row), row.get("digest"))),
        _state(row),
        *(_cell(row.get(name)) for name in COUNTS.values()),
    ]


def _versions(row: Mapping[str, Any]) -> str:
    """The version of the model, and those of the LoRA adapters beside it."""
    adapters = row.get("adapters")
    served = adapters.items() if isinstance(adapters, dict) else ()
    labels = [f"{name}@{each.get('weight_version')}" for name, each in served if isinstance(each, dict)]
    return ", ".join([str(row.get("weight_version") or "-"), *labels])


def _cell(value: object, style: str = "") -> Text:
    """A table shows each text of a server's on a few lines at most, and a dash for what the server does not know."""
    return Text("-" if value in (None, "") else quoted(str(value), CELL_CHARACTERS), style)


def _state(row: Mapping[str, Any]) -> Text:
    if row.get("dirty"):
        return Text("dirty", "bold red")
    if not row.get("ready"):
        return _cell(f"not ready: {row.get('reason') or 'no reason given'}", "yellow")
    return Text("paused", "yellow") if row.get("paused") else Text("ready", "green")
