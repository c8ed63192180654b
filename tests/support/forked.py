"""Forked: ``python -c code arguments...`` without the seconds that importing torch takes, as a child of the fork server.

For commands whose own start is not what is tested: nothing is imported anew, and handlers of ``atexit`` do not run.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

from tests.support.processes import start_fork_server

COMMAND = "from weightcast.cli import app; app()"
"""The code of the weightcast command."""


class Forked:
    """A running process, with the methods of ``subprocess.Popen`` that tests use.

    ``descriptors``: how many files it may open. ``log``: where what it prints is added to; without one it is kept until ``close``.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        environment: Mapping[str, str],
        descriptors: int | None = None,
        log: Path | None = None,
    ) -> None:
        start_fork_server()
        if log is None:
            with tempfile.NamedTemporaryFile(delete=False) as output:
                self._output = Path(output.name)
        else:
            self._output = log
        self._is_kept = log is not None
        words = [str(argument) for argument in arguments]
        self._process = get_context("forkserver").Process(
            target=_run, args=(code, words, dict(environment), str(self._output), descriptors), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Return once it has printed a text."""
        end = time.monotonic() + timeout_s
        while text not in (printed := self._output.read_text(encoding="utf-8") if self._output.exists() else ""):
            assert self.returncode is None, f"it ended with {self.returncode}:\n{printed}"
            assert time.monotonic() < end, f"it did not print {text!r}:\n{printed}"
            time.sleep(0.02)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("weightcast", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it printed, once it has ended: its output and its errors together, and nothing beside them."""
        self.wait(timeout)
        printed = self._output.read_text(encoding="utf-8") if self._output.exists() else ""
        return printed, ""

    def close(self) -> None:
        """End it, whatever it does; what it printed is gone, unless it has a log."""
        self._process.kill()
        self._process.join()
        if not self._is_kept:
            self._output.unlink(missing_ok=True)


def run_forked(code: str, *arguments: object, environment: Mapping[str, str], timeout_s: float) -> tuple[int, str]:
    """The exit status of a process that ends by itself, and all that it printed."""
    process = Forked(code, *arguments, environment=environment)
    try:
        printed, _ = process.communicate(timeout_s)
        assert process.returncode is not None
        return process.returncode, printed
    finally:
        process.close()


def limit_descriptors(count: int) -> None:
    """Have this process open so many files at most."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def _run(code: str, arguments: list[str], environment: Mapping[str, str], output: str, descriptors: int | None) -> None:
    gc.freeze()
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if descriptors is not None:
        limit_descriptors(descriptors)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
