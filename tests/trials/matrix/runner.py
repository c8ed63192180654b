"""Runner: plays cells in several processes side by side; one that hangs is ended and named."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

import msgspec

from tests.support.network import remove_networks_of
from tests.trials.matrix.cells import Cell
from tests.trials.matrix.results import Result
from weightcast.untrusted.known import known

CELL_TIMEOUT_S = 90.0
LOG_NBYTES = 2000
OVER = "the run's time was over"


class Runner:
    """``run`` once. Cells go to whichever job is free, in order; results come in the order of the cells."""

    def __init__(self, jobs: int, *, cell_timeout_s: float = CELL_TIMEOUT_S, budget_s: float = float("inf")) -> None:
        self._jobs, self._cell_timeout_s = jobs, cell_timeout_s
        self._end = time.monotonic() + budget_s
        self._waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
        self._results: dict[str, Result] = {}
        self._stop = threading.Event()

    def run(self, cells: Sequence[Cell], on_result: Callable[[Result], None] = lambda result: None) -> list[Result]:
        """Play all; those that the budget leaves no time for are "skipped". ``on_result`` is called on the jobs' threads."""
        for cell in cells:
            self._waiting.put(cell)
        jobs = [threading.Thread(target=self._work, args=(on_result,)) for _ in range(min(self._jobs, len(cells)))]
        for job in jobs:
            job.start()
        try:
            for job in jobs:
                job.join()
        except BaseException:
            self._stop.set()
            raise
        return [self._results[cell.id] for cell in cells]

    def stop(self) -> None:
        """End soon, from any thread: what is being played is killed, what waits is skipped."""
        self._stop.set()

    def _work(self, on_result: Callable[[Result], None]) -> None:
        player: _Player | None = None
        try:
            while True:
                try:
                    cell = self._waiting.get_nowait()
                except queue.Empty:
                    return
                left_s = self._end - time.monotonic()
                if left_s <= 0 or self._stop.is_set():
                    result = _unplayed(cell, "skipped", OVER)
                else:
                    player = player or _Player()
                    result = player.play(cell, min(self._cell_timeout_s, left_s), self._stop)
                    if result.state == "hung" and (self._stop.is_set() or left_s < self._cell_timeout_s):
                        result = _unplayed(cell, "skipped", OVER)  # it was not given the time of a cell
                    if not player.alive:
                        player.close()
                        player = None
                self._results[cell.id] = result
                on_result(result)
        finally:
            if player is not None:
                player.close()


class _Player:
    """A worker process in a group of its own: whatever a cell started ends with it."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trials.matrix.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ},
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def play(self, cell: Cell, timeout_s: float, stop: threading.Event) -> Result:
        """The result of one cell; "hung" when there is none in time, which ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # then it says nothing, which is seen below
            self._process.stdin.write(f"{cell.id}\n".encode())
            self._process.stdin.flush()
        end = time.monotonic() + timeout_s
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            if stop.is_set() or time.monotonic() > end:
                said = self._tail()
                self.close()
                return _unplayed(cell, "hung", f"no end within {timeout_s:.0f} s: {said}")
        line = self._process.stdout.readline()
        if not line:
            said = self._tail()
            self.close()
            return _unplayed(cell, "failed", f"its process ended: {said}")
        return msgspec.json.decode(line, type=known(Result))

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_NBYTES))
        return self._log.read().decode(errors="replace")

    def close(self) -> None:
        """Kill the process and its group; idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        remove_networks_of(self._process.pid)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _unplayed(cell: Cell, state: str, text: str) -> Result:
    fields = {"fault": cell.fault, "transport": cell.transport, "mode": cell.mode, "state": state, "text": text}
    return msgspec.convert(fields, known(Result))
