"""The life of one end of a pair, the same in every transport: after an error or an abort only ``close`` is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weightcast.deadline import Deadline
from weightcast.errors import TransportError


class EndGuard:
    """Remembers why an end died, and refuses every later use of the end. ``abort`` may come from any thread."""

    def __init__(self, end: str) -> None:
        self._end = end
        self._aborted = threading.Event()
        self._death: str | None = None

    @property
    def aborted(self) -> bool:
        return self._aborted.is_set()

    @property
    def is_well(self) -> bool:
        """Whether the end can still be used."""
        return not self.aborted and self._death is None

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self._death = self._death or "it was closed"

    def check(self) -> None:
        """Raise TransportError when the end was aborted or is dead."""
        if self.aborted:
            raise TransportError(f"{self._end} was aborted")
        if self._death is not None:
            raise TransportError(f"{self._end} is dead: {self._death}", hint="Make a new pair")

    @contextmanager
    def use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Wraps each use of the end. Any exception that leaves the block, interrupts included, kills the end."""
        self.check()
        try:
            deadline.check(what)
            yield
        except BaseException as error:
            self._death = f"{what} failed with {type(error).__name__}: {error}"
            raise
