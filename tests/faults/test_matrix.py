"""Every fault of the matrix: a named error in time, nobody hangs, no mixed version, the next round works, nothing leaks.

Each fault is played once in each mode, under transports by turns; `make matrix` plays all of them under all transports.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.trials.matrix import CPU_TRANSPORTS, Cell, cells
from tests.trials.matrix.results import Result, read_results
from tests.trials.matrix.runner import Runner
from tests.trials.matrix.table import BEGIN, END, markdown

DOCS = Path(__file__).parents[2] / "docs"
JOBS = 2
TIMEOUT_S = 90.0


def by_turns() -> list[Cell]:
    """One transport for each fault and mode."""
    every = cells(CPU_TRANSPORTS)
    some: dict[tuple[str, str], list[Cell]] = {}
    for cell in every:
        some.setdefault((cell.fault, cell.mode), []).append(cell)
    return [choices[number % len(choices)] for number, choices in enumerate(some.values())]


class Background:
    """Cells that are played while tests wait for theirs."""

    def __init__(self, chosen: list[Cell]) -> None:
        self._results: dict[tuple[str, str, str], Result] = {}
        self._changed = threading.Condition()
        self._runner = Runner(JOBS, cell_timeout_s=60)
        self._thread = threading.Thread(target=self._runner.run, args=(chosen, self._take))
        self._thread.start()

    def _take(self, result: Result) -> None:
        with self._changed:
            self._results[result.key] = result
            self._changed.notify_all()

    def result(self, cell: Cell) -> Result:
        key = (cell.fault, cell.transport, cell.mode)
        end = time.monotonic() + TIMEOUT_S
        with self._changed:
            while key not in self._results:
                assert self._changed.wait(end - time.monotonic()), f"{cell.id} was not played in {TIMEOUT_S:g} s"
        return self._results[key]

    def close(self) -> None:
        self._runner.stop()
        self._thread.join()


@pytest.fixture(scope="module")
def play(request: pytest.FixtureRequest) -> Iterator[Callable[[Cell], Result]]:
    """Gives the result of a cell; plays only cells whose tests were selected."""
    selected = [
        item.callspec.params["cell"]
        for item in request.session.items
        if item.fspath == request.node.fspath and hasattr(item, "callspec")
    ]
    background = Background(selected)
    yield background.result
    background.close()


@pytest.mark.parametrize("cell", by_turns(), ids=lambda cell: cell.id)
def test_cell(cell: Cell, play: Callable[[Cell], Result]) -> None:
    result = play(cell)
    if result.state == "skipped" and "CI" not in os.environ:  # there, a cell that cannot be played is a cell that fails
        pytest.skip(result.text)
    assert result.state == "passed", result.text
    assert result.text


def test_the_record_has_every_cell_and_the_document_shows_it() -> None:
    """Those of a GPU are recorded where one is; whatever is recorded must be a cell that exists."""
    record = read_results(DOCS / "failure-matrix.json")
    states = {result.key: result.state for result in record}
    wanted = [(cell.fault, cell.transport, cell.mode) for cell in cells(CPU_TRANSPORTS)]
    assert {key: states.get(key, "missing") for key in wanted} == dict.fromkeys(wanted, "passed")
    assert states.keys() <= {(cell.fault, cell.transport, cell.mode) for cell in cells()}
    document = (DOCS / "failure-modes.md").read_text(encoding="utf-8")
    assert document.partition(BEGIN)[2].partition(END)[0].strip() == markdown(record).strip()
