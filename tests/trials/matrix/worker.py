"""python -m tests.trials.matrix.worker: plays the cells whose ids come in, one a line, and answers with results.

A process of its own for each of the runner's jobs: a cell that hangs can be ended with it, and its leaks are its own.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback

import msgspec

from tests.support.network import obstacle
from tests.support.processes import be_a_host_for_nccl
from tests.trials.matrix.cells import Cell, cells
from tests.trials.matrix.results import Result
from weightcast.errors import WeightcastError
from weightcast.transports.registry import registry
from weightcast.untrusted.known import known


def play(cell: Cell) -> Result:
    """Play one cell. The broad except is on purpose: whatever goes wrong is what came of the cell."""
    why_not = _why_not(cell)
    if why_not is not None:
        return _result(cell, "skipped", why_not)
    start = time.monotonic()
    try:
        outcome = cell.run()
    except Exception:
        return _result(cell, "failed", traceback.format_exc(), played_s=time.monotonic() - start)
    return _result(cell, "passed", outcome.text, seconds=outcome.seconds, played_s=time.monotonic() - start)


def _why_not(cell: Cell) -> str | None:
    if cell.needs_network:
        return obstacle()
    try:
        registry().get(cell.carried_by)
    except WeightcastError as error:
        return f"{cell.transport}: {error}"
    return None


def _result(cell: Cell, state: str, text: str, **numbers: float | None) -> Result:
    fields = {"fault": cell.fault, "transport": cell.transport, "mode": cell.mode, "state": state, "text": text}
    return msgspec.convert({**fields, **numbers}, known(Result))


def main() -> None:
    """Answers go to the standard output this process was started with; whatever else prints, prints to the errors."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    be_a_host_for_nccl()
    gc.freeze()  # leaks are looked for after every cell, and nothing that was imported is one
    by_id = {cell.id: cell for cell in cells()}
    for line in sys.stdin:
        result = play(by_id[line.strip()])
        answers.write(msgspec.json.encode(result) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
