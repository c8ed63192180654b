"""Commits: each engine makes the round's version live between two steps, and its workers prove what is live then.

In-place engines receive inside their commit. They go first, because they may still fail, and staged engines can then simply stay at n.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from weightcast.errors import AnswerLost, DeadlineExceeded, PeerLost, WeightcastError
from weightcast.messages import Committed, Verified
from weightcast.report.model import Phase
from weightcast.trainer.clients.base import CommitOrder, CommitReply
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import EngineProgress, RoundBook
from weightcast.trainer.round.delivery import Delivery
from weightcast.trainer.round.proof import RoundProof
from weightcast.trainer.round.streaming import Streaming
from weightcast.trainer.round.timeline import Timeline
from weightcast.trainer.settings import Settings

logger = logging.getLogger(__name__)

REPEAT_AFTER_S = 0.2


class Commits:
    """The commits of one round."""

    def __init__(
        self,
        settings: Settings,
        outcomes: RoundBook,
        delivery: Delivery,
        streaming: Streaming,
        proof: RoundProof,
        timeline: Timeline,
    ) -> None:
        self._settings, self._outcomes, self._timeline = settings, outcomes, timeline
        self._delivery, self._streaming, self._proof = delivery, streaming, proof

    def run(self, pool: ThreadPoolExecutor, engines: Sequence[EngineLink], is_streamed: bool) -> None:
        """Have all engines commit that have not failed; what becomes of each is in its outcome."""
        groups = [[engine for engine in engines if engine.in_place == in_place] for in_place in (True, False)]
        if self._settings.require == "live":
            groups = [list(engines)]
        for group in groups:
            reading = self._streaming.reading_in_commit(group)
            if self._outcomes.failed:
                return
            if len(group) == 1 and not reading:
                self._commit(pool, group[0], is_streamed)
                continue
            futures = [pool.submit(self._commit, pool, engine, is_streamed) for engine in group]
            if reading:
                self._streaming.read_in_commit(reading, [engine for engine in group if engine.in_place])
            for future in futures:
                future.result()

    def _commit(self, pool: ThreadPoolExecutor, engine: EngineLink, is_streamed: bool) -> None:
        fed = [worker for worker in engine.workers if worker.in_place and (is_streamed or not worker.pulls)]
        try:
            self._outcomes.guard(engine, "commit", lambda: self._go_live(pool, engine, fed))
        finally:
            for worker in engine.workers:
                self._delivery.leave(worker)

    def _go_live(self, pool: ThreadPoolExecutor, engine: EngineLink, fed: Sequence[WorkerLink]) -> None:
        """Approve, order and confirm one engine's commit. The ``fed`` workers get their bytes meanwhile."""
        outcome = self._outcomes.of(engine)
        for worker in engine.workers:
            self._delivery.tell(worker, self._approval(worker))
        outcome.may_be_committed = True
        start = self._timeline.elapsed_s()
        feeding = [pool.submit(self._feed, engine, worker) for worker in fed]
        try:
            reply = self._order(engine, outcome)
        except WeightcastError as error:
            where = {
                "engine": engine.name,
                "worker": engine.suspect(),
                "phase": "commit",
                "round": self._delivery.round,
            }
            self._outcomes.note(engine, error.at(**where))  # type: ignore[arg-type]
            for worker in fed:
                if worker.end is not None and not worker.pulls:
                    worker.end.abort()
            raise
        for future in feeding:
            future.result()
        for name, seconds in reply.phases.items():
            outcome.phases.append(Phase(name=name, start_s=start, seconds=seconds))
            start += seconds
        for worker in engine.workers:
            self._confirm(engine, worker)
        outcome.committed = outcome.error is None

    def _feed(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Give an in-place worker what it cannot fetch by itself while its engine's commit runs."""

        def work() -> None:
            self._delivery.give(engine, worker, Committed, "commit", self._delivery.deadline)

        try:
            self._outcomes.guard(engine, "commit", work, worker)
        finally:
            self._delivery.leave(worker)

    def _order(self, engine: EngineLink, outcome: EngineProgress) -> CommitReply:
        """Have the engine commit. A lost answer is no lost commit: the order is repeated, as the round's number makes that
        harmless, until the engine answers or a worker is gone."""
        deadline = self._delivery.deadline
        order = CommitOrder(
            epoch=self._delivery.epoch,
            round=self._delivery.round,
            version=self._proof.version,
            pause=self._settings.pause,
            clear_cache=self._settings.clear_cache,
        )
        first, lost = True, None
        while True:
            try:
                with engine.while_there(deadline) as waiting:
                    return engine.client.commit(order, waiting)
            except DeadlineExceeded as error:
                if lost is not None:
                    raise lost from error  # that is what happened; the repetition only ran out of time
                raise
            except AnswerLost as error:
                lost = error
                logger.info("%s: the answer to the commit was lost: %s", engine.name, str(error))
                if engine.lost() or deadline.remaining_s() <= REPEAT_AFTER_S:
                    raise
            except PeerLost as error:
                if first and not error.reached:
                    outcome.may_be_committed = False  # nobody listens: the order never arrived
                raise
            first = False
            time.sleep(REPEAT_AFTER_S)

    def _approval(self, worker: WorkerLink) -> Verified:
        return Verified(
            epoch=self._delivery.epoch,
            round=self._delivery.round,
            version=self._proof.version,
            content=f"{self._proof.content:016x}",
            digest=self._proof.expected[worker.digest_key],
        )

    def _confirm(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Compare the live bytes' own digest, taken by the worker after it went live."""
        done = self._delivery.take(engine, worker, Committed, "commit", self._delivery.deadline, cancellable=False)
        assert isinstance(done, Committed)
        progress = self._outcomes.progress(worker)
        progress.digest = done.digest
        if worker.in_place:
            progress.nbytes, progress.seconds = done.nbytes, done.transfer_s
        self._proof.check(worker.digest_key, done.digest, "live")
