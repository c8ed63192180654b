"""Helper: a thread that carries out one engine's calls, so that whoever waits for one can stop waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from weightcast.deadline import Deadline, result_within
from weightcast.errors import DeadlineExceeded

T = TypeVar("T")


class Helper:
    """Runs calls one after another. A call that hangs holds up those after it, and each of them ends by its own deadline.

    The thread is made for the first call and does not keep the interpreter alive.
    """

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def run(self, work: Callable[[], T], deadline: Deadline) -> T:
        """The result of ``work``; DeadlineExceeded when it is not there in time. Work that began goes on to its end."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._carry_out, name=f"weightcast-{self._engine}", daemon=True)
                self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, work))

        def late() -> DeadlineExceeded:
            began = not future.cancel()
            return deadline.exceeded(
                "the call to the engine",
                engine=self._engine,
                hint=None if began else "It was not asked, as it has not answered the call before; wait until it has",
            )

        return result_within(future, deadline, late)

    def close(self) -> None:
        """Let the thread end after the call that it is in, if any."""
        with self._starting:
            if self._thread is not None:
                self._calls.put(None)
                self._calls, self._thread = queue.SimpleQueue(), None

    def _carry_out(self) -> None:
        calls = self._calls
        while (item := calls.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
                future.set_exception(error)
            del item, future, work
