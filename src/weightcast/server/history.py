"""RoundHistory: the latest orders that an engine carried out, for the page at /weightcast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from weightcast.report.rounds import PageRound, in_sequence

KEPT = 200


@dataclass(slots=True)
class OrderResult:
    """What is live after an order, and how long its phases took."""

    version: str
    phases: dict[str, float] = field(default_factory=dict)


class RoundHistory:
    """The latest ``KEPT`` entries. For one thread, that of the event loop.

    ``error`` of an entry is a class's name: what an error says is for the owner of the token.
    """

    def __init__(self) -> None:
        self._entries: deque[PageRound] = deque(maxlen=KEPT)

    @contextmanager
    def record(self, action: str, epoch: int, round: int, version: str) -> Iterator[OrderResult]:
        """Time the body and keep an entry of it, also when it raises; what the body puts into the outcome is kept with it."""
        at, start, error = time.time(), time.perf_counter(), None
        outcome = OrderResult(version)
        try:
            yield outcome
        except Exception as raised:
            error = type(raised).__name__
            raise
        finally:
            self._entries.append(
                PageRound(
                    at=at,
                    action=action,
                    epoch=epoch,
                    round=round,
                    version=outcome.version,
                    seconds=time.perf_counter() - start,
                    phases=in_sequence(outcome.phases),
                    error=error,
                )
            )

    def entries(self) -> list[PageRound]:
        """Oldest first."""
        return list(self._entries)
