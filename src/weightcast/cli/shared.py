"""What several commands share: options, the console, and how an error ends a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from weightcast.errors import WeightcastError

TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="WEIGHTCAST_TOKEN", help="Token of the server's weight-changing routes.", show_default=False
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.001, help="Deadline of the whole call, in seconds.")]


def console() -> Console:
    """For results, on standard output."""
    return Console()


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print a WeightcastError as one message on standard error and exit with status 1; a user is shown no traceback."""
    try:
        yield
    except WeightcastError as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None
