"""Timeline: when the phases of one round began and how long they took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from weightcast.report.model import Phase
from weightcast.trainer.progress import Progress


class Timeline:
    """Collects phases relative to its making."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress if progress is not None else Progress(None)
        self._start = time.perf_counter()
        self.at = time.time()
        """When that was, in seconds since 1970."""
        self._phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body, also when it raises."""
        began = self.elapsed_s()
        self._progress(name)
        try:
            yield
        finally:
            self._phases.append(Phase(name=name, start_s=began, seconds=self.elapsed_s() - began))

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(sorted(self._phases, key=lambda phase: phase.start_s))
