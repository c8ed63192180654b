"""python -m tests.trials.matrix: play the fault matrix, print it, keep it; ends with status 1 for a broken promise."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from tests.trials.matrix.cells import CPU_TRANSPORTS, EXTRA_TRANSPORTS, GPU_TRANSPORTS, Cell, cells
from tests.trials.matrix.results import Result, merge, read_results, write_results
from tests.trials.matrix.runner import CELL_TIMEOUT_S, Runner
from tests.trials.matrix.table import markdown, rich_table, write_between_markers

DOCUMENT, RECORD = Path("docs/failure-modes.md"), Path("docs/failure-matrix.json")

SHOWN_LINES = 12
"""Of what a broken cell said; a matrix.json has all."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m tests.trials.matrix", description=__doc__)
    made.add_argument("--transports", default=",".join(CPU_TRANSPORTS), help="comma-separated")
    made.add_argument("--fault", default="", help="only faults whose name has this text")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells played at the same time")
    made.add_argument("--cell-timeout", type=float, default=CELL_TIMEOUT_S, help="seconds until a cell counts as hung")
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds for the whole run")
    made.add_argument("--out", type=Path, help="write matrix.json and matrix.md into this folder, and no document")
    made.add_argument("--merge", type=Path, help="play nothing: take in a matrix.json that was played elsewhere")
    made.add_argument("--again", type=Path, help="only what did not pass in this matrix.json")
    made.add_argument("--dry", action="store_true", help="print only, write nothing")
    return made


def main() -> int:
    """Parse, play, print, write."""
    given = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else 220)
    results = read_results(given.merge) if given.merge else _play(_chosen(given), given, console)
    console.print(rich_table(results))
    broken = [result for result in results if result.is_broken]
    for result in broken:
        console.print(
            f"\n{result.fault}, {result.transport} {result.mode}: {result.state}\n{result.text}", markup=False
        )
    skipped = {result.text for result in results if result.state == "skipped"}
    for reason in sorted(skipped):
        console.print(f"not played: {reason}", markup=False)
    if not given.dry:
        _keep(results, given.out)
    return 1 if broken else 0


def _chosen(given: argparse.Namespace) -> list[Cell]:
    transports = [name.strip() for name in given.transports.split(",") if name.strip()]
    unknown = set(transports) - {*CPU_TRANSPORTS, *EXTRA_TRANSPORTS, *GPU_TRANSPORTS}
    if unknown:
        raise SystemExit(f"no transport {', '.join(sorted(unknown))} in the matrix")
    passed = {result.key for result in read_results(given.again) if result.state == "passed"} if given.again else set()
    return [
        cell
        for cell in cells(transports)
        if given.fault.lower() in cell.fault.lower() and (cell.fault, cell.transport, cell.mode) not in passed
    ]


def _play(chosen: list[Cell], given: argparse.Namespace, console: Console) -> list[Result]:
    start, told, lock = time.monotonic(), list[Result](), threading.Lock()

    def tell(result: Result) -> None:
        with lock:
            told.append(result)
            if given.out is not None:  # what was played is kept even if this process does not see the end
                given.out.mkdir(parents=True, exist_ok=True)
                write_results(given.out / "matrix.json", told)
        line = f"{len(told)}/{len(chosen)} {result.state} {result.fault} {result.transport} {result.mode}"
        console.print(f"{line} in {result.played_s:.1f} s", highlight=False, markup=False)

    results = Runner(given.jobs, cell_timeout_s=given.cell_timeout, budget_s=given.budget).run(chosen, tell)
    console.print(f"{len(results)} cells in {time.monotonic() - start:.0f} s\n", highlight=False)
    return results


def _keep(results: list[Result], folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "matrix.json", results)
        (folder / "matrix.md").write_text(markdown(results), encoding="utf-8")
        return
    order = [(cell.fault, cell.transport, cell.mode) for cell in cells()]
    every = merge(read_results(RECORD), results, order)
    write_results(RECORD, every)
    write_between_markers(DOCUMENT, markdown(every))


if __name__ == "__main__":
    sys.exit(main())
