"""weightcast push: stream a safetensors checkpoint into running engines."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightcast.cli.progress import ShownProgress
from weightcast.cli.shared import (
    DraftOption,
    JsonOption,
    KeepOption,
    RenameOption,
    TimeoutOption,
    TokenFileOption,
    TokenOption,
    UnusedOption,
    chosen_token,
    console,
    print_table,
    reported_errors,
)
from weightcast.deadline import MOST_S

if TYPE_CHECKING:
    from weightcast.report.model import Report, WorkerReport

SHOWN = 12


class Mode(StrEnum):
    """How bytes become live."""

    auto = "auto"
    staged = "staged"
    in_place = "in_place"


class Pause(StrEnum):
    """What happens to requests in flight at the commit."""

    keep = "keep"
    wait = "wait"
    abort = "abort"
    none = "none"


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with safetensors files.", exists=True, file_okay=False)],
    to: Annotated[list[str], typer.Option("--to", help="URL of an engine's server; repeat it for several.")],
    token: TokenOption = None,
    token_file: TokenFileOption = None,
    transport: Annotated[str, typer.Option(help="auto, or the name of a transport (see weightcast doctor).")] = "auto",
    mode: Annotated[Mode, typer.Option(help="Shadow and swap, straight into live weights, or what fits.")] = Mode.auto,
    device: Annotated[
        str,
        typer.Option(help="Where the checkpoint is published from. cuda: it is copied to a GPU first (it has to fit)."),
    ] = "cpu",
    pause: Annotated[Pause, typer.Option(help="Requests in flight: freeze, finish, end, or leave alone.")] = Pause.keep,
    unused: UnusedOption = None,
    rename: RenameOption = None,
    draft: DraftOption = None,
    keep: KeepOption = None,
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Refuse values that are NaN or infinite, by the names of their tensors."),
    ] = False,
    takeover: Annotated[bool, typer.Option("--takeover", help="Also when a trainer is connected: it is left.")] = False,
    timeout: TimeoutOption = 300.0,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=MOST_S,
            help="Seconds to wait for servers that are not there yet, or still load their model, before the deadline counts.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress on standard error.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stream CHECKPOINT into running engines: all of them serve it afterwards, or none does."""
    with reported_errors(as_json=as_json), contextlib.nullcontext() if quiet else ShownProgress() as progress:
        report = _push(
            {"": checkpoint} | ({} if draft is None else {"draft.": draft}),
            to,
            chosen_token(token, token_file),
            device=device,
            transport=transport,
            mode=mode,
            pause=pause,
            takeover=takeover,
            unused=unused or [],
            rename=rename or [],
            keep=[part.value for part in keep or []],
            timeout_s=timeout,
            wait_s=wait,
            check_finite=check_finite,
            progress=progress,
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        print_report(report, console())
    if not (report.ok and report.digests_match):
        raise typer.Exit(1)


def _push(
    folders: dict[str, Path],
    urls: list[str],
    token: str | None,
    *,
    device: str,
    transport: str,
    mode: Mode,
    pause: Pause,
    takeover: bool,
    unused: list[str],
    rename: list[str],
    keep: list[Literal["draft"]],
    timeout_s: float,
    wait_s: float | None,
    check_finite: bool,
    progress: ShownProgress | None,
) -> Report:
    if progress is not None:
        progress.say("load")
    from weightcast import Publisher
    from weightcast.deadline import Deadline
    from weightcast.sources import SafetensorsSource
    from weightcast.sources.renaming import renames

    if progress is not None:
        progress.say("read")
    with Publisher(
        SafetensorsSource(folders, device=device, deadline=Deadline(timeout_s), rename=renames(rename)),
        engines=urls,
        token=token,
        transport=transport,
        mode=mode.value,
        timeout_s=timeout_s,
        pause=pause.value,
        takeover=takeover,
        unused=unused,
        keep=keep,
        check_finite=check_finite,
        on_progress=None if progress is None else progress.tell,
    ) as publisher:
        publisher.connect(wait_s=wait_s)
        report: Report = publisher.publish()
    return report


def print_report(report: Report, out: Console) -> None:
    """One round as a line, a table of workers and a line of phases."""
    from weightcast.report.model import format_bytes

    out.print(str(report), highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("engine", "worker", "transport", "bytes", "seconds"):
        table.add_column(name, justify="right" if name in ("bytes", "seconds") else "left")
    for engine in report.engines:
        for worker in engine.workers:
            sent, seconds = format_bytes(worker.nbytes), f"{worker.seconds:.3f}"
            table.add_row(engine.name, str(worker.rank), worker.transport, sent, seconds)
        if engine.error is not None:
            table.add_row(engine.name, "", "", "", Text(f"failed: {engine.error}"), style="red")
    print_table(out, table)
    for reason in dict.fromkeys(w.reason for e in report.engines for w in e.workers if _is_news(w)):
        out.print(f"transport {reason}", highlight=False, markup=False, soft_wrap=True)
    phases = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in report.phase_seconds().items())
    out.print(f"phases: {phases}", highlight=False, soft_wrap=True)
    out.print(_proof(report), highlight=False, markup=False, soft_wrap=True)


def _is_news(worker: WorkerReport) -> bool:
    """Whether something is to be said of how a worker's transport was chosen: another one was passed over."""
    return worker.reason not in ("", worker.transport, f"{worker.transport} (first choice)")


def _proof(report: Report) -> str:
    """How what is live compares with what was published."""
    from weightcast.manifest.names import number_of, shown

    if not report.digests_match:
        return f"published digest {report.digest} DOES NOT MATCH what is live"
    if report.unused:
        left_out = f"{number_of(len(report.unused), 'tensor')} left out: {shown(report.unused, SHOWN)}"
        return f"what is live was proven, of published digest {report.digest}; {left_out}"
    return f"published digest {report.digest} matches what is live"
