"""What several commands share: options, the console, and how an error ends a command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from weightcast.cli.wording import in_options
from weightcast.deadline import MOST_S
from weightcast.errors import ErrorForm, InvalidInput, RoundFailed, WeightcastError

TOKEN_VARIABLE = "WEIGHTCAST_TOKEN"
MOST_COLUMNS = 100_000
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        help=f"Token of the server's weight-changing routes. Every user of this machine sees it in the list of processes: "
        f"better give --token-file or {TOKEN_VARIABLE}.",
        show_default=False,
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help=f"File that holds the token (or the variable {TOKEN_VARIABLE}).", show_default=False
    ),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.001, max=MOST_S, help="Deadline of the whole call, in seconds.")
]


class Kept(StrEnum):
    """A part of engines that may keep its weights."""

    draft = "draft"


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one line of JSON instead; an error is its field error.")
]
UnusedOption = Annotated[
    list[str] | None,
    typer.Option(
        "--unused",
        help="Pattern of tensors that engines rightly do without, 'v_head.*' say; repeat it for several.",
        show_default=False,
    ),
]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rename",
        metavar="OLD=NEW",
        help="Prefix of the checkpoint's names and what engines have in its place; repeat it for several.",
        show_default=False,
    ),
]
DraftOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the model that engines speculate with.", exists=True, file_okay=False, show_default=False
    ),
]
KeepOption = Annotated[
    list[Kept] | None,
    typer.Option(
        help="A part of engines that CHECKPOINT has nothing of, and that keeps its weights.", show_default=False
    ),
]


def chosen_token(token: str | None, token_file: Path | None) -> str | None:
    """The token of --token, --token-file or the environment, in that order; None where none of them has one."""
    from weightcast.untrusted.secret import token_from_file, usable_token

    if token is not None and token_file is not None:
        raise InvalidInput("--token and --token-file are two tokens", field="token", hint="Give one of them")
    if token_file is not None:
        return token_from_file(token_file)
    return usable_token(token if token is not None else os.environ.get(TOKEN_VARIABLE) or None)


def console() -> Console:
    """For results, on standard output."""
    return Console()


def print_table(out: Console, table: Table) -> None:
    """A table. Into a pipe or a file its lines are as long as they are, for there is no terminal whose width would cut them."""
    if not out.is_terminal:
        out = Console(file=out.file, width=out.measure(table, options=out.options.update(width=MOST_COLUMNS)).maximum)
    out.print(table)


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    typer.echo(msgspec.json.encode(value).decode())


def error_fields(error: WeightcastError) -> dict[str, Any]:
    """An error as JSON has it: its form on the wire, and what a failed round says of the fleet."""
    fields: dict[str, Any] = msgspec.to_builtins(ErrorForm.of(error))
    if isinstance(error, RoundFailed):
        fields["causes"] = {name: error_fields(cause) for name, cause in error.causes.items()}
        fields["serving"], fields["dirty"] = error.serving, list(error.dirty)
    return fields


@contextlib.contextmanager
def reported_errors(*, as_json: bool = False) -> Iterator[None]:
    """Print a WeightcastError as one message on standard error and exit with status 1; a user is shown no traceback.

    With ``as_json`` standard output has it, too, as an object whose only field is ``error``.
    """
    try:
        yield
    except WeightcastError as error:
        if as_json:
            print_json({"error": error_fields(error)})
        Console(stderr=True).print(
            f"{type(error).__name__}: {in_options(error)}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None
