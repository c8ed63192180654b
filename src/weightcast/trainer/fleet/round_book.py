"""RoundBook: what came of a round so far, engine by engine, and whether one failure ends it for all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from weightcast.errors import StateError, WeightcastError
from weightcast.logs import about
from weightcast.messages import Digested
from weightcast.report.model import Phase
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.settings import Require

logger = logging.getLogger(__name__)


class Cancelled(StateError):
    """A wait ended because its engine, or the round, failed elsewhere."""


@dataclass(slots=True)
class WorkerProgress:
    """What is known of one worker in this round."""

    nbytes: int = 0
    seconds: float = 0.0
    digest: int | None = None
    digested: Digested = "all"


@dataclass(slots=True)
class EngineProgress:
    """What is known of one engine in this round."""

    error: WeightcastError | None = None
    committed: bool = False
    may_be_committed: bool = False
    has_answered: bool = False
    """The engine has said that it carried out the commit."""
    phases: list[Phase] = field(default_factory=list)


class RoundBook:
    """The book of one round. Thread-safe: each engine's steps run on threads of their own.

    With require="all" the first failure of any engine ends the round for all; with "live" it drops that engine, and the round
    ends when none is left.
    """

    def __init__(self, engines: Sequence[EngineLink], require: Require, epoch: int, round: int) -> None:
        self._engines, self._require = engines, require
        self._epoch, self._round = epoch, round
        self._of = {engine.name: EngineProgress() for engine in engines}
        self._progress: dict[tuple[str, int], WorkerProgress] = {}
        self._failed = threading.Event()
        self._noting = threading.Lock()

    def of(self, engine: EngineLink) -> EngineProgress:
        """The outcome of one engine of this round."""
        return self._of[engine.name]

    def progress(self, worker: WorkerLink) -> WorkerProgress:
        """What is known of one worker; made when nothing was."""
        return self._progress.setdefault(worker.member.key, WorkerProgress())

    def has_progress(self, worker: WorkerLink) -> bool:
        """Whether a worker has said that it has the bytes."""
        return worker.member.key in self._progress

    def __contains__(self, engine: EngineLink) -> bool:
        return engine.name in self._of

    @property
    def was_seen(self) -> bool:
        """Whether an engine may have served this version: then its number is used up."""
        return any(outcome.may_be_committed for outcome in self._of.values())

    @property
    def failed(self) -> bool:
        """Whether the round is over for all."""
        return self._failed.is_set()

    @property
    def errors(self) -> dict[str, WeightcastError]:
        """The first error of each engine that has one."""
        return {name: outcome.error for name, outcome in self._of.items() if outcome.error is not None}

    def is_over(self, engine: EngineLink) -> bool:
        """Whether an engine has no more part in this round."""
        return self.failed or self._of[engine.name].error is not None

    def guard(
        self, engine: EngineLink, phase: str, work: Callable[[], object], worker: WorkerLink | None = None
    ) -> None:
        """Run a step of one engine; its first failure is noted and drops the engine, or ends the round for all."""
        outcome = self._of[engine.name]
        if outcome.error is not None or (self.failed and not outcome.may_be_committed):
            return
        try:
            work()
        except Cancelled:
            return
        except WeightcastError as error:
            rank = worker.member.rank if worker is not None else engine.suspect()
            self.note(engine, error.at(engine=engine.name, worker=rank, phase=phase, round=self._round))
        except BaseException:
            self.fail()
            raise

    def note(self, engine: EngineLink, error: WeightcastError) -> None:
        """An engine failed."""
        with self._noting:
            outcome = self._of[engine.name]
            # What broke because the round was called off is no cause of its failing.
            if outcome.error is None and not (self.failed and not outcome.may_be_committed):
                outcome.error = error
                where = about(
                    epoch=self._epoch, round=self._round, engine=engine.name, worker=error.worker, phase=error.phase
                )
                logger.warning("round %d.%d: %s", self._epoch, self._round, str(error), extra=where)
        if self._require == "all" or all(outcome.error is not None for outcome in self._of.values()):
            self.fail()
        else:
            _end_transfers(engine)

    def fail(self) -> None:
        """End the round for all; idempotent."""
        if not self._failed.is_set():
            self._failed.set()
            for engine in self._engines:
                _end_transfers(engine)


def _end_transfers(engine: EngineLink) -> None:
    """Wake whoever sends to staged workers. In-place ones receive inside their commit: cut off, they would be dirty."""
    for worker in engine.workers:
        pushes = worker.transport is not None and not worker.transport.pulls
        if worker.end is not None and pushes and not worker.in_place:
            worker.end.abort()
