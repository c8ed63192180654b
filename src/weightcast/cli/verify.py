"""weightcast verify: are an engine's live weights those of a checkpoint? Compares digests computed at both ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from weightcast.cli.shared import (
    DraftOption,
    JsonOption,
    KeepOption,
    Kept,
    RenameOption,
    TimeoutOption,
    TokenFileOption,
    TokenOption,
    UnusedOption,
    chosen_token,
    console,
    print_json,
    reported_errors,
)

if TYPE_CHECKING:
    from weightcast.trainer.comparison import Comparison

SHOWN = 12


def command(
    url: Annotated[str, typer.Argument(help="URL of the engine's server.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder with safetensors files.", exists=True, file_okay=False)],
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    unused: UnusedOption = None,
    rename: RenameOption = None,
    draft: DraftOption = None,
    keep: KeepOption = None,
    timeout: TimeoutOption = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Compare an engine's live weights with CHECKPOINT. Exit status 1 unless they are proven equal."""
    from weightcast.deadline import Deadline
    from weightcast.manifest.names import check_patterns
    from weightcast.sources.renaming import renames
    from weightcast.sources.safetensors import SafetensorsSource
    from weightcast.trainer.clients.http import HttpEngineClient
    from weightcast.trainer.comparison import compare
    from weightcast.trainer.fleet.places import refuse_idle

    with reported_errors(as_json=as_json):
        deadline = Deadline(timeout)
        client = HttpEngineClient(url, token=chosen_token(token, token_file))
        folders = {"": checkpoint} | ({} if draft is None else {"draft.": draft})
        source = SafetensorsSource(folders, deadline=deadline, rename=renames(rename or ()))
        try:
            patterns = check_patterns(unused or ())
            refuse_idle(patterns, source.manifest)
            comparison = compare(client, source, deadline, patterns, [part.value for part in keep or ()])
        finally:
            source.close()
            client.close()
    if as_json:
        print_json(fields_of(client.name, comparison))
    else:
        _print(client.name, comparison, console())
    if not comparison.proven:
        raise typer.Exit(1)


def fields_of(engine: str, comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it: tensors by what was found of them."""
    live, checkpointed = comparison.digests
    return {
        "engine": engine,
        "version": comparison.version,
        "proven": comparison.proven,
        "digest": comparison.content,
        "live_digest": live,
        "checkpoint_digest": checkpointed,
        "equal": comparison.equal,
        "different": comparison.different,
        "not_compared": comparison.unproven,
        "absent": comparison.absent,
        "unused": comparison.unused,
        "error": None,
    }


def _print(engine: str, comparison: Comparison, out: Console) -> None:
    from weightcast.manifest.names import number_of

    out.print(f"{engine} serves {comparison.version}", highlight=False, soft_wrap=True)
    out.print(f"digest of the checkpoint {comparison.content}", highlight=False, soft_wrap=True)
    _print_tensors(comparison, out)
    unused = number_of(len(comparison.unused), "tensor")
    left_out = f", but for {unused} that the engine does without" if comparison.unused else ""
    cast = ", in the engine's types" if comparison.is_cast else ""
    out.print(f"[green]equal[/green]{cast}{left_out}" if comparison.proven else "[bold red]not proven equal[/bold red]")


def _print_tensors(comparison: Comparison, out: Console) -> None:
    from weightcast.manifest.names import number_of, patterns_for

    equal, different = number_of(len(comparison.equal), "tensor"), len(comparison.different)
    out.print(f"{equal} equal, {different} different", highlight=False)
    unproven = [f"{name} ({reason})" for name, reason in comparison.unproven.items()]
    for title, names in (
        ("different", comparison.different),
        ("not compared", unproven),
        ("in the checkpoint, not held by the engine", comparison.absent),
        ("not compared, as the engine does without it", comparison.unused),
    ):
        for name in names[:SHOWN]:
            out.print(f"  {title}: {name}", highlight=False, markup=False, soft_wrap=True)
        if len(names) > SHOWN:
            out.print(f"  {title}: {len(names) - SHOWN} more", highlight=False)
    for part in Kept:
        if f"{part.value}." in comparison.unproven:
            out.print(
                f"  where it has a checkpoint of its own: --{part.value} FOLDER; to leave it out: --keep {part.value}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    if comparison.absent:
        held = [*comparison.equal, *comparison.different, *comparison.unproven]
        options = " ".join(f"--unused '{pattern}'" for pattern in patterns_for(comparison.absent, held)[:SHOWN])
        out.print(
            f"  where the engine rightly does without them: {options}", highlight=False, markup=False, soft_wrap=True
        )
