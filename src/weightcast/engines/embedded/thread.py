"""EngineThread: the one thread that runs the model. Commands run on it between two forward passes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from weightcast.at_exit import at_exit
from weightcast.engines.embedded.core import EngineCore
from weightcast.errors import DeadlineExceeded, EngineError

_logger = logging.getLogger(__name__)

T = TypeVar("T")
_IDLE_CHECK_S = 1.0
AT_EXIT_S = 10.0
"""How long an engine that nobody shut down may hold up the end of its process; a step takes less."""


class EngineThread:
    """Steps a core while there is work and runs commands in between, in the order they came."""

    def __init__(self, core: EngineCore, *, num_threads: int | None, name: str) -> None:
        self.core = core
        self.fatal: str | None = None
        """Why the thread ended, if it did not end on purpose."""
        self._num_threads = num_threads or torch.get_num_threads()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"weightcast-engine-{name}", daemon=True)
        self._stay_at_exit = at_exit(lambda: self.stop(AT_EXIT_S))
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Run a command on the engine's thread before its next step; the future has its result or error.

        The broad except is on purpose: whatever the command raises belongs to the caller.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command())
            except Exception as error:  # noqa: BLE001 - see above
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(EngineError(f"the engine's thread ends: {type(error).__name__}: {error}"))
                raise

        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise EngineError(f"the engine is gone: {self.fatal or 'it was shut down'}")
            self._commands.append(run)
            self._wake.notify()
        return future

    def stop(self, timeout_s: float) -> None:
        """End all requests and the thread; idempotent. Raises DeadlineExceeded when a step takes longer than that."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineExceeded(f"the engine's thread did not end within {timeout_s:g} s")

    def _run(self) -> None:
        """The broad except is on purpose: an engine that dies must tell everyone who waits for it."""
        try:
            # OpenMP keeps the number of threads per calling thread.
            torch.set_num_threads(self._num_threads)
            while not self._stopping:
                self._run_commands()
                if self.core.has_work():
                    self.core.step()
                else:
                    self._sleep()
        except BaseException as error:
            # The class only: open routes say why nothing is served, and the text of an error may quote anything.
            self.fatal = type(error).__name__
            _logger.critical("the engine's thread ended", exc_info=True)
        finally:
            self._close()

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _sleep(self) -> None:
        with self._wake:
            if not self._commands and not self._stopping:
                self._wake.wait(_IDLE_CHECK_S)

    def _close(self) -> None:
        self._stay_at_exit()
        with self._wake:
            self._stopping = True
        self._run_commands()
        if self.fatal is not None:
            self.core.fail_all(f"the engine is gone: {self.fatal}")
        else:
            self.core.abort()
        self.core.resume()
        self.core.transfer.shutdown()
        self.core.adapter_transfers.shutdown()
