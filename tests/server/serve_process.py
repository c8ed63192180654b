"""weightcast serve as a process of its own, ended by its id whatever happens."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

START = "from weightcast.cli import app; app()"


@dataclass
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    ready_file: Path

    def stop(self, signal_number: int, timeout_s: float = 20.0) -> tuple[int, str]:
        """Send a signal and wait; the exit status and everything that was printed."""
        self.process.send_signal(signal_number)
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output


def command_line(*arguments: object, start: str = START) -> list[str]:
    return [sys.executable, "-c", start, "serve", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WEIGHTCAST_", "OMP_WAIT"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def _limit(descriptors: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


@contextmanager
def serving(
    model: Path,
    folder: Path,
    *arguments: object,
    timeout_s: float = 90.0,
    descriptors: int | None = None,
    unix_path: Path | None = None,
    start: str = START,
    **more: str,
) -> Iterator[Served]:
    """Start a server, on a free port or a unix socket, and wait until it listens. ``descriptors``: how many files it may open."""
    ready = folder / "url"
    address = ("--port", 0) if unix_path is None else ("--unix-socket", unix_path)
    process = subprocess.Popen(
        command_line(model, *address, "--ready-file", ready, *arguments, start=start),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**more),
        text=True,
        preexec_fn=None if descriptors is None else partial(_limit, descriptors),
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
