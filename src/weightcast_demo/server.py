"""A ``weightcast serve`` process that lives as long as a demo: started with a random token, ended by its process id."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError
from weightcast.testing.ports import free_port

LAUNCH = ("-m", "weightcast.cli")
"""Arguments to Python that run the command line, wherever its script is installed."""

STOP_TIMEOUT_S = 10.0


class ServerProcess:
    """A context manager around one server process, whose routes are on ``url`` once ``wait_until_listening`` returned.

    Leaving ends it: by a request first, by force after ten seconds. It runs in a session of its own, so that an interrupt
    from the keyboard reaches only the caller, who can still use it while winding up.
    """

    def __init__(self, model: Path, *arguments: str, port: int = 0, timeout_s: float = 120.0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_urlsafe(24)
        self._arguments = ("serve", str(model), "--host", "127.0.0.1", "--port", str(self.port), *arguments)
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        # Append mode: the child shares the offset, and reading the log must not move where it writes.
        self._log = tempfile.TemporaryFile(mode="a+b")
        try:
            self._process = self._start()
        except OSError:
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            try:
                process.terminate()
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()
                process.wait()
                self._log.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def client(self) -> httpx.Client:
        """A client for its routes, with the token; trusts no proxy settings, as the server is on this machine."""
        headers = {"Authorization": f"Bearer {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=self._timeout_s, trust_env=False)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines that it wrote."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-num_lines:])

    def check(self) -> None:
        """Raise EngineError with its last words when it has ended by itself."""
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            raise EngineError(f"the server process ended with status {status}:\n{self.log_tail()}", engine=self.url)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "WEIGHTCAST_TOKEN": self.token,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        return subprocess.Popen(
            [sys.executable, *LAUNCH, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def wait_until_listening(self) -> None:
        """Return when it answers HTTP (it need not be ready to serve); EngineError if it ended, DeadlineExceeded if it hangs."""
        deadline = Deadline(self._timeout_s)
        with self.client() as client:
            while True:
                self.check()
                try:
                    client.get("/health", timeout=2.0)
                except httpx.TransportError:
                    if deadline.passed:
                        raise DeadlineExceeded(
                            f"the server did not listen after {deadline.timeout_s:g} s:\n{self.log_tail()}"
                        ) from None
                    time.sleep(0.1)
                else:
                    return


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM unwinds the stack (exit status 143) instead of ending the process on the spot.

    Main thread only; the former handler is put back.
    """
    import signal
    from types import FrameType

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
