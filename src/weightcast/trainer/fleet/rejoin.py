"""Rejoiner: admits absent engines on threads of its own, so that a slow one does not hold up the rounds of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, StateError, WeightcastError
from weightcast.trainer.fleet.link import EngineLink

MAX_THREADS = 16
GRACE_S = 1.0
"""An attempt ends by its deadline give or take this."""


@dataclass(slots=True)
class _Attempt:
    future: Future[None]
    deadline: Deadline


class Rejoiner:
    """At most one attempt per engine runs at a time. Not thread-safe but for ``close``: one caller."""

    def __init__(self, admit: Callable[[EngineLink, Deadline], None]) -> None:
        self._admit = admit
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="weightcast-join")
        self._attempts: dict[str, _Attempt] = {}
        self._sluggish: set[str] = set()
        self._closing = threading.Lock()
        self._closed = False

    def attempt(
        self, engines: Iterable[EngineLink], deadline: Deadline, patience: Deadline | None = None
    ) -> dict[str, WeightcastError]:
        """Try to admit engines by ``deadline``; errors by name. With ``patience`` wait no longer than that.

        An attempt that is still running then is named with DeadlineExceeded and goes on beside; a later call hears how it ended.
        One that runs since an earlier call, or whose forerunner came to no end in time, is not waited for again.
        """
        engines = list(engines)
        waiting = []
        for engine in engines:
            before = self._attempts.get(engine.name)
            if before is not None and not before.future.done():
                if patience is None:
                    waiting.append(before.future)
                continue
            if before is not None:
                self._outcome(engine)  # how that one ended is no answer to this call
            own = deadline.part()  # called off alone
            with self._closing:  # an attempt that runs is one that ``close`` finds
                if self._closed:
                    continue
                try:
                    made = _Attempt(self._pool.submit(self._admit, engine, own), own)
                    self._attempts[engine.name] = made
                except BaseException:  # of a signal's handler: nobody would wait for the attempt
                    own.cancel()
                    raise
            if patience is None or engine.name not in self._sluggish:
                waiting.append(made.future)
        wait(waiting, patience.remaining_s() if patience is not None else deadline.remaining_s() + GRACE_S)
        failures = {}
        for engine in engines:
            error = self._outcome(engine)
            if error is not None:
                failures[engine.name] = error
        return failures

    def _outcome(self, engine: EngineLink) -> WeightcastError | None:
        attempt = self._attempts.get(engine.name)
        if attempt is None:  # ``close`` came on another thread
            return StateError(
                "joining was called off",
                engine=engine.name,
                phase="join",
                hint="The publisher was closed on another thread: make a new one",
            )
        if not attempt.future.done():
            return DeadlineExceeded("it has not joined yet; the attempt goes on", engine=engine.name, phase="join")
        self._attempts.pop(engine.name, None)
        error = attempt.future.exception()
        if error is not None and not isinstance(error, WeightcastError):
            raise error
        if isinstance(error, DeadlineExceeded):
            self._sluggish.add(engine.name)
        else:
            self._sluggish.discard(engine.name)
        return error

    def cancel(self, engine: EngineLink) -> None:
        """End an attempt, if one runs, and wait for its end: a fraction of a second."""
        attempt = self._attempts.pop(engine.name, None)
        if attempt is not None:
            attempt.deadline.cancel()
            wait([attempt.future])

    def close(self) -> None:
        """End all attempts; idempotent."""
        with self._closing:
            self._closed = True
            for attempt in self._attempts.values():
                attempt.deadline.cancel()
            self._attempts.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
