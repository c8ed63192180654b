"""Workers: those of xdist as forks of one process that has imported all tests, for ``pytest -n 4 -p tests.support.workers``.

A worker of its own takes eleven seconds of a core before its first test, and most of them go into importing torch, transformers and the
tests. The process that the workers are forked from collects the tests once; in a fork, collecting finds every module imported. Each
worker has a forked server of ranks from the beginning, too.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.warm import client, serve, wait_until_warm

PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 300.0
"""Whoever has compiled nothing yet compiles all of torch and transformers first."""


class Workers:
    """The process that workers are forked from. It ends with the process that made it."""

    def __init__(self, arguments: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="weightcast-workers-")
        address, log = Path(self._folder.name, "socket"), Path(self._folder.name, "log")
        command = [sys.executable, "-m", "tests.support.workers", str(address), *arguments]
        # A fork cannot read OpenMP's variables anew. A session of its own: what a terminal interrupts tells its worker so, once.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        wait_until_warm(self._process, address, log, START_TIMEOUT_S)
        self.python = shlex.join([*client(address), "python"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Have xdist start its workers, and those that take the place of a worker that died, as forks."""
    if Path("/dev/nvidiactl").exists():
        return  # a module of tests may ask for the GPU when it is imported, and then no fork could use the GPU
    workers = Workers(config.args)
    config.add_cleanup(workers.close)
    for spec in specs:
        spec.python = workers.python


def fork_the_server_of_ranks() -> None:
    """Have multiprocessing fork its fork server from this process. It would start a Python that imports everything again."""
    from weightcast.testing import ranks

    with _unheard():
        resource_tracker.ensure_running()
        with patch.object(util, "spawnv_passfds", _fork):
            ranks.start_fork_server()


@contextmanager
def _unheard() -> Iterator[None]:
    """What processes that are started inside print to stderr goes nowhere: ranks of all tests would print between the dots of pytest."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fork(path: str, arguments: Sequence[bytes | str], descriptors: Sequence[int]) -> int:
    """Do what ``multiprocessing.util.spawnv_passfds`` does, without a new interpreter."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a worker prints to is its connection to xdist
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number not in descriptors:
            with suppress(OSError):  # of the listing itself
                os.close(number)
    vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)  # told to each child anew
    try:
        exec(arguments[-1], {"__name__": "__main__"})
    finally:
        os._exit(0)


def main() -> None:
    """Import what the tests import, serve, and be a worker in forks."""
    address, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    pytest.main(["--collect-only", "-q", *arguments])
    work = serve(address)
    fork_the_server_of_ranks()
    work()


if __name__ == "__main__":
    main()
