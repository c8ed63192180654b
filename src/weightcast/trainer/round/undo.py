"""The way back: engines that took part in a round that failed return to version n, or never leave it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from weightcast.control.coordinator import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import BaseMismatch, DeadlineExceeded, PeerLost, StateError, WeightcastError
from weightcast.logs import about
from weightcast.messages import Abort
from weightcast.trainer.fleet.link import UNKNOWN, EngineLink
from weightcast.trainer.fleet.round_book import EngineProgress, RoundBook

logger = logging.getLogger(__name__)


class WayBack:
    """Takes engines of one round back. Afterwards each one's link says what it serves, or that this is unknown."""

    def __init__(self, outcomes: RoundBook, coordinator: Coordinator, *, epoch: int, round: int) -> None:
        self._outcomes, self._coordinator = outcomes, coordinator
        self._epoch, self._round = epoch, round

    def take(self, engines: Sequence[EngineLink], deadline: Deadline) -> None:
        """Take these engines back, side by side, by the deadline; never raises for an engine's sake."""
        abort = Abort(epoch=self._epoch, round=self._round, reason="the trainer called it off")
        for engine in engines:
            for worker in engine.workers:
                self._coordinator.send(worker.member, abort)
        committed = [engine for engine in engines if self._outcomes.of(engine).may_be_committed]
        with ThreadPoolExecutor(max(1, len(committed)), thread_name_prefix="weightcast-undo") as pool:
            for future in [pool.submit(self._roll_back, engine, deadline) for engine in committed]:
                future.result()
        for engine in engines:
            self._note_left(engine)

    def _note_left(self, engine: EngineLink) -> None:
        """Have the engine's link say what the round has left of it."""
        outcome = self._outcomes.of(engine)
        if isinstance(outcome.error, BaseMismatch):
            engine.version = UNKNOWN  # the next round asks it first
        if outcome.error is not None or not self._is_reusable(engine):
            engine.broken = "its last round failed"

    def _is_reusable(self, engine: EngineLink) -> bool:
        """Whether all pairs can be used again: a transfer that was cut off leaves a dead one."""
        return all(
            worker.transport is not None
            and worker.transport.pulls
            and (worker.in_place or self._outcomes.has_progress(worker))
            for worker in engine.workers
        )

    def _roll_back(self, engine: EngineLink, deadline: Deadline) -> None:
        """Have an engine that may have committed return to version n, and ask what it serves now."""
        outcome = self._outcomes.of(engine)
        try:
            try:
                engine.client.rollback(self._epoch, self._round, deadline)
            except (DeadlineExceeded, PeerLost):
                raise  # it may still be at it: what it says now need not hold
            except WeightcastError as error:
                if not (isinstance(error, StateError) and engine.in_place):
                    self._note(engine, outcome, error)
            engine.learn(engine.client.status(deadline))
        except WeightcastError as error:
            self._note(engine, outcome, error)
            engine.version, engine.dirty = UNKNOWN, engine.in_place

    def _note(self, engine: EngineLink, outcome: EngineProgress, error: WeightcastError) -> None:
        where = about(epoch=self._epoch, round=self._round, engine=engine.name, phase="undo")
        text = "round %d.%d: %s could not be taken back: %s"
        logger.warning(text, self._epoch, self._round, engine.name, str(error), extra=where)
        outcome.error = outcome.error or error.at(engine=engine.name, phase="undo", round=self._round)
