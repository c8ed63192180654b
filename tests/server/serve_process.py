"""weightcast serve as a process of its own, ended by its id whatever happens.

Servers are forked from a process that has imported torch (see tests.support.forked), but where starting or ending is what is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.forked import COMMAND, Forked, limit_descriptors, run_forked

START = COMMAND


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str] | Forked
    ready_file: Path

    def stop(self, signal_number: int, timeout_s: float = 60.0) -> tuple[int, str]:
        """Send a signal and wait; the exit status and everything that was printed."""
        self.process.send_signal(signal_number)
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-c", START, "serve", *map(str, arguments)]


def refused(*arguments: object, **more: str) -> str:
    """What serve says when it does not even start."""
    status, said = run_forked(START, "serve", *arguments, environment=environment(**more), timeout_s=60)
    assert status != 0
    assert "Traceback" not in said
    return said


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WEIGHTCAST_", "OMP_WAIT"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@contextmanager
def serving(
    model: Path,
    folder: Path,
    *arguments: object,
    timeout_s: float = 90.0,
    descriptors: int | None = None,
    unix_path: Path | None = None,
    start: str = START,
    forked: bool = True,
    **more: str,
) -> Iterator[Served]:
    """Start a server, on a free port or a unix socket, and wait until it listens. ``descriptors``: how many files it may open."""
    ready = folder / "url"
    address = ("--port", 0) if unix_path is None else ("--unix-socket", unix_path)
    words = ("serve", model, *address, "--ready-file", ready, *arguments)
    process: subprocess.Popen[str] | Forked
    if forked:
        process = Forked(start, *words, environment=environment(**more), descriptors=descriptors)
    else:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(**more),
            text=True,
            preexec_fn=None if descriptors is None else partial(limit_descriptors, descriptors),
        )
    try:
        deadline = time.monotonic() + timeout_s
        while not ready.exists():
            if process.poll() is not None:
                raise AssertionError(f"the server ended with {process.returncode}:\n{process.communicate()[0]}")
            assert time.monotonic() < deadline, "the server did not listen in time"
            time.sleep(0.05)
        yield Served(ready.read_text().strip(), process, ready)
    finally:
        process.kill()
        process.communicate()
