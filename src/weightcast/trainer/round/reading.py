"""Reading: one pass over the source's stream, for the workers that read its windows. It runs on the thread that called ``publish()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import Cancelled, RoundBook
from weightcast.trainer.round.windows import WindowTurns

Pair = tuple[EngineLink, WorkerLink]

PATIENCE_S = 1.0
"""How much longer than the round a reading waits for its workers: each ends its own wait first, which says who it is."""


class Reading:
    """Windows are filled one after the other; each is shown to the workers that want of it, who say in ``turns`` when they are through."""

    def __init__(self, fleet: Fleet, outcomes: RoundBook, workers: Sequence[Pair], deadline: Deadline) -> None:
        self._source, self._ranks, self._outcomes = fleet.source, fleet.ranks, outcomes
        self._workers, self._deadline = workers, deadline
        self.turns = WindowTurns(fleet.source.slots, {worker.member.key: worker.parts for _, worker in workers})

    def run(self, show: Callable[[Sequence[Pair], int], None], take: Callable[[int], None]) -> None:
        """Read the stream to its end, on all trainer ranks. ``show`` has workers read a window, ``take`` is called for each meanwhile.

        Raises Cancelled when the round has failed elsewhere, what the source raises, and what other ranks say.
        """
        others_end = self._ranks.exhaust()
        patience = Deadline(self._deadline.limit_s() + PATIENCE_S)
        for window in self._source.pour(
            lambda window: self.turns.claim(window, patience, self._over),
            self._deadline,
            to_the_end=not self._ranks.alone,
        ):
            show([pair for pair in self._workers if window in pair[1].parts], window)
            self.turns.fill(window)
            if (cause := self._over()) is not None:
                raise cause
            take(window)
        others_end(self._deadline)

    def _over(self) -> WeightcastError | None:
        return Cancelled("the round failed elsewhere") if self._outcomes.failed else None
