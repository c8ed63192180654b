"""Progress: what a Publisher is doing now, told to a listener of the user's while it is doing it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What begins now, or how far it has come.

    ``phase``: "wait" (for a server that is not there yet), "connect", "join", "record" (an engine notes where tensors go), "joined",
    "set-up" (plans and transports), then the phases of a round as its report names them. ``engine`` is the engine that does it;
    empty where all do. ``done`` of ``total`` workers have got there, where that is counted.
    """

    phase: str
    engine: str = ""
    done: int = 0
    total: int = 0


Listener = Callable[[Step], None]


class Progress:
    """Tells the listener, if there is one. From any thread; what the listener raises is logged and stops nothing."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens."""
        return self._listener is not None

    def __call__(self, phase: str, engine: str = "", done: int = 0, total: int = 0) -> None:
        """Tell of one step."""
        if self._listener is None:
            return
        try:
            self._listener(Step(phase=phase, engine=engine, done=done, total=total))
        except Exception:
            logger.exception("the listener to progress failed")
