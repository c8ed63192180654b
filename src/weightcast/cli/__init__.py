"""The weightcast command. Each subcommand is a module here with a function ``command``, imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weightcast import __version__

COMMANDS = ("serve", "push", "demo", "status", "watch", "report", "verify", "doctor")


class LazyGroup(TyperGroup):
    """Imports a subcommand's module when its name is given, so that no command pays for another's imports."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        single = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
        single.command(name=cmd_name)(module.command)
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weightcast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sync freshly trained weights from a trainer into running inference engines."""
