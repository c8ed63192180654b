"""weightcast demo: a policy learns while a live server serves it; weights are pushed into a running server; a tiny model to try with."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from weightcast.cli.shared import console, reported_errors


class Demo(StrEnum):
    """Which demo."""

    sorting = "sorting"
    smollm = "smollm"
    model = "model"


def command(
    demo: Annotated[
        Demo,
        typer.Argument(
            help="sorting: train and serve; smollm: push a checkpoint; model: write a tiny model to FOLDER."
        ),
    ] = Demo.sorting,
    folder: Annotated[Path | None, typer.Argument(help="model: where the model goes.", show_default="policy")] = None,
    short: Annotated[bool, typer.Option("--short", help="sorting: a smaller task, in under a minute.")] = False,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="sorting: optimizer steps.", show_default="56, short: 24")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="sorting: stop learning after about this long.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="sorting, model: seed of everything random.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server; 0: a free one.")] = 0,
    report: Annotated[Path, typer.Option(help="sorting: where the page goes.")] = Path("report.html"),
    cache: Annotated[Path, typer.Option(help="smollm: folder for the checkpoint.")] = Path(".cache"),
) -> None:
    """Run a demo on this machine: a trainer here, a server in a process that the demo starts and ends."""
    # Before torch is imported: two processes whose OpenMP threads spin on the same cores slow each other down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from weightcast_demo.server import ended_by_sigterm

    with reported_errors(), ended_by_sigterm():
        if folder is not None and demo is not Demo.model:
            from weightcast.errors import InvalidInput

            raise InvalidInput(
                f"the demo {demo.value} writes no folder",
                field="folder",
                hint=f"Leave {folder} out, or: weightcast demo model {folder}",
            )
        if demo is Demo.model:
            passed = _model(folder or Path("policy"), seed)
        elif demo is Demo.smollm:
            passed = _smollm(cache, port)
        else:
            passed = _sorting(short, iterations, seconds, seed, port, report)
    if not passed:
        raise typer.Exit(1)


def _model(folder: Path, seed: int) -> bool:
    from weightcast_demo.tiny import write_model

    nbytes = write_model(folder, seed)
    console().print(
        f"{folder}: a Qwen3 of two layers with random weights ({nbytes:,} bytes) and a tokenizer",
        highlight=False,
        soft_wrap=True,
    )
    return True


def _sorting(short: bool, iterations: int | None, seconds: float | None, seed: int, port: int, report: Path) -> bool:
    from weightcast_demo.record import Options
    from weightcast_demo.sorting import run_demo

    short_task = {"num_digits": 4, "iterations": 24, "lr": 2e-4, "held_out": 512, "min_rise": 0.03, "judged_from": 20}
    asked = {"iterations": iterations} if iterations is not None else {}
    task: dict[str, Any] = {**(short_task if short else {}), **asked}
    options = Options(seconds=seconds, seed=seed, port=port, report=report, **task)
    return run_demo(options, console()).passed


def _smollm(cache: Path, port: int) -> bool:
    from weightcast_demo.smollm import EXPECTED, run_demo

    out = console()
    answers = run_demo(out, cache=cache, port=port)
    mark = "[green]✓[/green]" if answers.passed else "[bold red]✗[/bold red]"
    out.print(f"{mark} the answer names {EXPECTED} after the push, and did not before", highlight=False)
    return answers.passed
