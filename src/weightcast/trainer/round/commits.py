"""Commits: each engine makes the round's version live between two steps, and its workers prove what is live then.

In-place engines receive inside their commit. They go first, because they may still fail, and staged engines can then simply stay at n.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from weightcast.errors import AnswerLost, DeadlineExceeded, PeerLost, WeightcastError
from weightcast.messages import Committed, Message, Verified
from weightcast.report.model import Phase
from weightcast.trainer.clients.base import CommitOrder, CommitReply
from weightcast.trainer.clients.fan_out import Call, make_calls
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
            together = [engine for engine in group if engine.client.commits_by_call]
            alone = [engine for engine in group if not engine.client.commits_by_call]
            futures = [pool.submit(self._commit, pool, engine, is_streamed) for engine in alone]
            if reading:
                futures.append(pool.submit(self._commit_together, pool, together, is_streamed))
                self._streaming.read_in_commit(reading, [engine for engine in group if engine.in_place])
            else:
                self._commit_together(pool, together, is_streamed)
            for future in futures:
                future.result()

    def _commit(self, pool: ThreadPoolExecutor, engine: EngineLink, is_streamed: bool) -> None:
        """One engine's commit, on this thread."""

        def go_live() -> None:
            going = self._start(pool, engine, is_streamed)
            self._settle(going, partial(self._order_now, going))

        with self._leaving([engine]):
            self._outcomes.guard(engine, "commit", go_live)
            self._confirm([engine])

    def _commit_together(self, pool: ThreadPoolExecutor, engines: Sequence[EngineLink], is_streamed: bool) -> None:
        """The commits of many engines, on this thread. An order whose answer was lost is repeated on a thread of its own."""
        calls: dict[Call, _Going] = {}
        repeated: list[Future[None]] = []

        def start(engine: EngineLink) -> None:
            going = self._start(pool, engine, is_streamed)
            waiting = going.waits.enter_context(engine.while_there(self._delivery.deadline))
            calls[engine.client.commit_call(self._commit_order(), waiting)] = going

        def settle(going: _Going, order: Callable[[], CommitReply]) -> None:
            self._outcomes.guard(going.engine, "commit", lambda: self._settle(going, order))

        with self._leaving(engines):
            for engine in engines:
                self._outcomes.guard(engine, "commit", partial(start, engine))
            for call in make_calls(list(calls)):
                going = calls[call]
                try:
                    reply = going.heard(partial(going.engine.client.commit_reply, call))
                except AnswerLost as error:
                    repeated.append(pool.submit(settle, going, partial(self._repeat, going.engine, error)))
                except WeightcastError as error:
                    settle(going, partial(_raise, error))
                else:
                    settle(going, partial(_same, reply))
            for future in repeated:
                future.result()
            self._confirm(engines)

    @contextmanager
    def _leaving(self, engines: Sequence[EngineLink]) -> Iterator[None]:
        """Afterwards no worker of these engines reads a window any more."""
        try:
            yield
        finally:
            for engine in engines:
                for worker in engine.workers:
                    self._delivery.leave(worker)

    # -- steps of one engine's commit

    def _start(self, pool: ThreadPoolExecutor, engine: EngineLink, is_streamed: bool) -> _Going:
        """Approve the commit, and give in-place workers what they cannot fetch by themselves, from now on."""
        for worker in engine.workers:
            self._delivery.tell(worker, self._approval(worker))
        outcome = self._outcomes.of(engine)
        outcome.may_be_committed = True
        fed = [worker for worker in engine.workers if worker.in_place and (is_streamed or not worker.pulls)]
        going = _Going(engine, outcome, fed, self._timeline.elapsed_s())
        going.feeding = [pool.submit(self._feed, engine, worker) for worker in fed]
        return going

    def _settle(self, going: _Going, order: Callable[[], CommitReply]) -> None:
        """Note what came of the order: ``order`` gives the engine's reply, or raises."""
        try:
            reply = order()
        except WeightcastError as error:
            engine = going.engine
            self._outcomes.note(
                engine,
                error.at(engine=engine.name, worker=engine.suspect(), phase="commit", round=self._delivery.round),
            )
            for worker in going.fed:
                if worker.end is not None and not worker.pulls:
                    worker.end.abort()
            raise
        for future in going.feeding:
            future.result()
        start = going.start_s
        for name, seconds in reply.phases.items():
            going.outcome.phases.append(Phase(name=name, start_s=start, seconds=seconds))
            start += seconds
        going.outcome.has_answered = True

    def _feed(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Give an in-place worker what it cannot fetch by itself while its engine's commit runs."""

        def work() -> None:
            self._delivery.give(engine, worker, Committed, "commit", self._delivery.deadline)

        try:
            self._outcomes.guard(engine, "commit", work, worker)
        finally:
            self._delivery.leave(worker)

    def _commit_order(self) -> CommitOrder:
        return CommitOrder(
            epoch=self._delivery.epoch,
            round=self._delivery.round,
            version=self._proof.version,
            pause=self._settings.pause,
            clear_cache=self._settings.clear_cache,
        )

    def _order_now(self, going: _Going) -> CommitReply:
        """Have the engine commit, and wait for its reply on this thread."""
        try:
            return going.heard(lambda: self._ask(going.engine))
        except AnswerLost as error:
            return self._repeat(going.engine, error)

    def _ask(self, engine: EngineLink) -> CommitReply:
        with engine.while_there(self._delivery.deadline) as waiting:
            return engine.client.commit(self._commit_order(), waiting)

    def _repeat(self, engine: EngineLink, lost: AnswerLost) -> CommitReply:
        """A lost answer is no lost commit: the order is repeated, as the round's number makes that harmless, until the engine answers or
        a worker is gone."""
        while True:
            logger.info("%s: the answer to the commit was lost: %s", engine.name, str(lost))
            if engine.lost() or self._delivery.deadline.remaining_s() <= REPEAT_AFTER_S:
                raise lost
            time.sleep(REPEAT_AFTER_S)
            try:
                return self._ask(engine)
            except DeadlineExceeded as error:
                raise lost from error  # that is what happened; the repetition only ran out of time
            except AnswerLost as error:
                lost = error

    def _approval(self, worker: WorkerLink) -> Verified:
        return Verified(
            epoch=self._delivery.epoch,
            round=self._delivery.round,
            version=self._proof.version,
            content=f"{self._proof.content:016x}",
            digest=self._proof.expected[worker.digest_key],
        )

    def _confirm(self, engines: Sequence[EngineLink]) -> None:
        """Compare the live bytes' own digests, which the workers take after they went live. For engines that have answered."""
        answered = [engine for engine in engines if self._outcomes.of(engine).has_answered]
        pairs = [(engine, worker) for engine in answered for worker in engine.workers]
        deadline = self._delivery.deadline
        for engine, worker, said in self._delivery.take_each(pairs, Committed, "commit", deadline, cancellable=False):
            self._outcomes.guard(engine, "commit", partial(self._check_live, worker, said), worker)
        for engine in answered:
            outcome = self._outcomes.of(engine)
            outcome.committed = outcome.error is None

    def _check_live(self, worker: WorkerLink, said: Message | WeightcastError) -> None:
        if isinstance(said, WeightcastError):
            raise said
        assert isinstance(said, Committed)
        progress = self._outcomes.progress(worker)
        progress.digest, progress.digested = said.digest, said.digested
        if worker.in_place:
            progress.nbytes, progress.seconds = said.nbytes, said.transfer_s
            worker.codec.note(said.nbytes, said.transfer_s)
        self._proof.check(worker.digest_key, said.digest, "live")


@dataclass(eq=False, slots=True)
class _Going:
    """One engine's commit that goes on. The ``fed`` workers get their bytes meanwhile."""

    engine: EngineLink
    outcome: EngineProgress
    fed: Sequence[WorkerLink]
    start_s: float
    feeding: list[Future[None]] = field(default_factory=list)
    waits: ExitStack = field(default_factory=ExitStack)
    """What lasts until the engine's answer is heard."""

    def heard(self, hear: Callable[[], CommitReply]) -> CommitReply:
        """The engine's first answer; raises its error, or the loss of a worker where that is what ended the wait."""
        try:
            with self.waits:
                return hear()
        except AnswerLost:
            raise
        except PeerLost as error:
            if not error.reached:
                self.outcome.may_be_committed = False  # nobody listens: the order never arrived
            raise
        raise AssertionError("a wait that ends swallows no error")


def _raise(error: WeightcastError) -> CommitReply:
    raise error


def _same(reply: CommitReply) -> CommitReply:
    return reply
