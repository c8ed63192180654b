"""weightcast status: what engines serve, as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weightcast.cli.shared import TokenFileOption, TokenOption, chosen_token, console, reported_errors
from weightcast.errors import WeightcastError
from weightcast.quoted import quoted

if TYPE_CHECKING:
    from weightcast.trainer.clients.http import HttpEngineClient

Row = Mapping[str, Any] | WeightcastError
CELL_CHARACTERS = 400
COLUMNS = ("engine", "model", "version", "digest", "state", "running", "waiting", "syncs")


def command(
    urls: Annotated[list[str], typer.Argument(help="URLs of engines' servers.")],
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Ask again and again until interrupted.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two questions with --watch.")] = 1.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Deadline of one question, in seconds.")] = 5.0,
) -> None:
    """Show what each engine serves. Exit status 1 if one cannot be reached."""
    from weightcast.trainer.clients.http import HttpEngineClient

    with reported_errors():
        given = chosen_token(token, token_file)
        clients = [HttpEngineClient(url, token=given) for url in urls]
        try:
            rows = ask_all(clients, timeout)
            if watch:
                rows = _watch(clients, rows, interval, timeout)
            else:
                console().print(status_table(clients, rows))
        finally:
            for client in clients:
                client.close()
    if any(isinstance(row, WeightcastError) for row in rows):
        raise typer.Exit(1)


def _watch(clients: Sequence[HttpEngineClient], rows: list[Row], interval: float, timeout: float) -> list[Row]:
    """Show until interrupted; returns what was seen last."""
    with Live(status_table(clients, rows), console=console(), auto_refresh=False) as live:
        try:
            while True:
                live.update(status_table(clients, rows), refresh=True)
                time.sleep(interval)
                rows = ask_all(clients, timeout)
        except KeyboardInterrupt:
            return rows


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


def status_table(clients: Sequence[HttpEngineClient], rows: Sequence[Row]) -> Table:
    """One line per engine."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("running", "waiting", "syncs") else "left", overflow="fold")
    for client, row in zip(clients, rows, strict=True):
        if isinstance(row, WeightcastError):
            table.add_row(client.name, "", "", "", _cell(f"{type(row).__name__}: {row.message}", "red"))
        else:
            table.add_row(client.name, *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[Text]:
    digest = row.get("digest")
    return [
        _cell(row.get("model", "?")),
        _cell(row.get("weight_version", "?")),
        _cell(digest) if digest else Text("-"),
        _state(row),
        *(_cell(row.get(name, "?")) for name in ("num_running", "num_waiting", "num_syncs")),
    ]


def _cell(value: object, style: str = "") -> Text:
    """A table shows each text of a server's on a few lines at most."""
    return Text(quoted(str(value), CELL_CHARACTERS), style)


def _state(row: Mapping[str, Any]) -> Text:
    if row.get("dirty"):
        return Text("dirty", "bold red")
    if not row.get("ready"):
        return _cell(f"not ready: {row.get('reason') or 'no reason given'}", "yellow")
    return Text("paused", "yellow") if row.get("paused") else Text("ready", "green")
