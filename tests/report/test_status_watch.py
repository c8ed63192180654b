"""`weightcast status --watch` in a terminal: the table follows what engines serve until it is interrupted."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tests.support.engine_process import TOKEN, EngineProcess, values_of

from weightcast import Publisher


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    with EngineProcess("staged") as made:
        assert isinstance(made, EngineProcess)
        yield made


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "COLUMNS": "200", "LINES": "40", "TERM": "xterm"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._seen = ""

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Return when ``text`` was written since the last call."""
        end = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < end, self._seen
            if select.select([self._ours], [], [], 0.2)[0]:
                written = os.read(self._ours, 65536).decode(errors="replace")
                self._seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
        self._seen = self._seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_the_table_follows_what_is_served(engine: EngineProcess) -> None:
    command = [sys.executable, "-m", "weightcast.cli", "status", engine.url, "--watch", "--interval", "0.2"]
    terminal = Terminal(*command)
    try:
        terminal.wait_for("default")
        with Publisher(values_of(1), [engine.url], token=TOKEN, timeout_s=20) as publisher:
            version = publisher.publish().version
        terminal.wait_for(version)
        engine.kill()
        terminal.wait_for("PeerLost")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(15) == 1, "an engine that cannot be reached is exit status 1"
    finally:
        terminal.close()
