"""One round, as the trainer runs it: begin, transfer, verify, commit, and the way back when something fails.

    begin     staged workers are told to receive; pulled bytes are made visible first. The source's digest is started, and what
              the source checks last is checked while a GPU computes it
    transfer  bytes travel while engines serve n (see delivery); meanwhile the source is digested. A stream is read here, window by
              window (see streaming)
    verify    every staged worker's digest must be the source's
    commit    engines make n+1 live between two steps (see commits); in-place engines receive now. For them a stream is read a
              second time
    (failure) whoever has not committed is told to abort; staged engines that may have are rolled back

The thread that calls does whatever nobody else could do meanwhile: a fleet of one engine needs no other thread, whose start
and end would take longer than the control messages do.

Every wait ends by the round's deadline, the way back at most ``UNDO_S`` after it. With require="all" one worker's failure ends
the waits for all others and the round; with "live" the engine is dropped from it and taken back, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from weightcast.deadline import Deadline
from weightcast.errors import (
    InvalidInput,
    StateError,
    Unsupported,
    WeightcastError,
)
from weightcast.messages import Message, Staged
from weightcast.report.model import Report
from weightcast.trainer.fleet.chains import settle_feeding
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import Cancelled, RoundBook
from weightcast.trainer.round.account import Account
from weightcast.trainer.round.commits import Commits
from weightcast.trainer.round.delivery import Delivery, Pair
from weightcast.trainer.round.proof import RoundProof
from weightcast.trainer.round.streaming import Streaming
from weightcast.trainer.round.timeline import Timeline
from weightcast.trainer.round.undo import WayBack

UNDO_S = 1.0
"""What taking back may last beyond the round's deadline."""
LIVE_TRANSFER_SHARE = 0.6
"""Share of the time left that a transfer may take where stragglers are dropped: the others still have to commit."""
UNDO_AT_LEAST_S = 0.3
DIGEST_HINT = "Give publish() more time; the extra 'fast' digests several times as fast on a CPU"


@dataclass(frozen=True, slots=True)
class Brief:
    """What one attempt is about: the version's number, that of the round, and what was found before it began.

    ``absent`` has the errors of engines that are not there. ``check`` is what the source still has to check; its error ends the
    round before any worker is approved, and is raised as it is.
    """

    number: int
    round: int
    deadline: Deadline
    timeline: Timeline
    absent: Mapping[str, WeightcastError]
    check: Callable[[], None]
    non_finite: Mapping[str, int] | None = None
    """How many published values are NaN or infinite, by tensor, where that was asked for."""


class Round:
    """One attempt to bring these engines of a fleet to the next version. Used once."""

    def __init__(self, fleet: Fleet, engines: list[EngineLink], brief: Brief) -> None:
        self._fleet, self._engines, self._brief = fleet, engines, brief
        self._source, self._settings, self._timeline = fleet.source, fleet.settings, brief.timeline
        self._deadline = self._transfer_deadline = brief.deadline
        self._refusal: WeightcastError | None = None
        self._is_committed = False
        self._report: Report | None = None
        self._outcomes = RoundBook(engines, self._settings.require, fleet.epoch, brief.round)
        self._account = Account(self._outcomes, brief.absent, number=brief.number, epoch=fleet.epoch, round=brief.round)
        self._ties = {engine.name: fleet.ties.doubtful(engine) for engine in engines}
        compared = {tie: fleet.ties.digests(tie, brief.deadline) for ties in self._ties.values() for tie in ties}
        self._proof = RoundProof(
            fleet.content(brief.deadline),
            fleet.expected,
            fleet.ranks.manifest,
            brief.number,
            compared,
            kept=fleet.kept,
            round=brief.round,
        )
        self._delivery = Delivery(fleet, self._outcomes, brief.round, brief.deadline)
        self._streaming = Streaming(fleet, self._outcomes, self._delivery)

    @property
    def was_seen(self) -> bool:
        """Whether an engine may have served this version: then its number is used up."""
        return self._outcomes.was_seen

    def run(self) -> Report:
        """Run the round; raises RoundFailed after everything that could be undone was, or what ``check`` raised."""
        # The caller's mode is for its own tensors: those made here, for later rounds, too, are plain ones.
        with torch.inference_mode(False):
            try:
                return self._run()
            finally:
                settle_feeding(self._engines, self._outcomes)

    def _run(self) -> Report:
        workers = [(engine, worker) for engine in self._engines for worker in engine.workers]
        self._fleet.coordinator.clear_inboxes(worker.member for _, worker in workers)
        try:
            with ThreadPoolExecutor(2 * max(1, len(workers)) + 1, thread_name_prefix="weightcast-round") as pool:
                self._transfer(pool, workers)
                if not self._outcomes.failed:
                    self._verify(workers)
                if not self._outcomes.failed:
                    self._commit(pool)
        except WeightcastError as error:
            self._outcomes.fail()
            self._undo(self._engines)
            if error is self._refusal:
                raise
            losses = self._fleet.ranks.line.losses("transfer")
            raise self._account.failure(self._fleet.engines, losses or {"trainer": error}) from error
        except BaseException:
            self._outcomes.fail()
            self._undo(self._engines)
            raise
        well = [engine for engine in self._engines if self._outcomes.of(engine).committed]
        if self._outcomes.failed or not well:
            self._undo(self._engines)
            failure = self._account.failure(self._fleet.engines, self._fleet.ranks.line.losses("transfer"))
            raise failure from next(iter(failure.causes.values()), None)
        self._undo([engine for engine in self._engines if not self._outcomes.of(engine).committed])
        for engine in well:
            engine.version, engine.digest, engine.dirty = self._proof.version, f"{self._proof.content:016x}", False
        self._is_committed = True
        return self.report()

    def report(self) -> Report:
        """What the round did, once it has run; that of a round that failed says what the way back left."""
        if self._report is None:
            self._report = self._account.report(
                self._fleet.engines,
                self._timeline,
                version=self._proof.version or str(self._brief.number),
                digest=self._proof.content,
                outcome="committed" if self._is_committed else "aborted",
                non_finite=self._brief.non_finite,
                own_nbytes=self._source.own_nbytes + self._fleet.kept.nbytes,
                held_s=self._source.held_s,
            )
        return self._report

    def _undo(self, engines: list[EngineLink]) -> None:
        if engines:
            way_back = WayBack(
                self._outcomes, self._fleet.coordinator, epoch=self._fleet.epoch, round=self._brief.round
            )
            with self._timeline.phase("undo"):
                # Counted from the round's deadline, whatever was needed to end its transfers.
                way_back.take(engines, Deadline(max(self._deadline.at + UNDO_S - time.monotonic(), UNDO_AT_LEAST_S)))

    # -- phases

    def _transfer(self, pool: ThreadPoolExecutor, workers: list[Pair]) -> None:
        if self._settings.require == "live":
            self._transfer_deadline = self._deadline.part(LIVE_TRANSFER_SHARE)
        staged = [(engine, worker) for engine, worker in workers if not worker.in_place]
        in_place = [(engine, worker) for engine, worker in workers if worker.in_place]
        if self._source.layout.is_streamed:
            self._transfer_stream(pool, workers, staged)
            return
        with self._timeline.phase("begin"):
            # Before the digest: making bytes visible waits for the trainer's GPU, which would have to digest first.
            self._delivery.show(staged)
            self._delivery.choose(workers)
            self._delivery.begin(staged)
            self._start_proof(workers)
            self._delivery.begin(in_place)
            with self._refusing(WeightcastError):
                self._brief.check()
            self._delivery.show(in_place)
        with self._timeline.phase("transfer"):
            self._delivery.turns.fill(0)
            pulled = [pair for pair in staged if pair[1].pulls]
            futures = [pool.submit(self._stage, *pair) for pair in staged if not pair[1].pulls]
            if len(pulled) > 1:
                futures.append(pool.submit(self._collect, pulled))
            futures += [pool.submit(self._look, *pair) for pair in in_place if pair[1].codec.changes]
            if staged:
                self._proof.compute()
            if len(pulled) == 1:
                self._collect(pulled)
            for future in futures:
                future.result()

    def _transfer_stream(self, pool: ThreadPoolExecutor, workers: list[Pair], staged: list[Pair]) -> None:
        """Stage what the stream yields, and digest it. In-place engines read the stream once more, in their commit."""
        with self._timeline.phase("begin"):
            with self._refusing(Unsupported):
                self._streaming.check(workers)
            self._delivery.choose(workers)
            self._delivery.begin(workers)
            self._start_proof(workers)
        with self._timeline.phase("transfer"):
            reading = self._streaming.reading(staged)
            futures = [pool.submit(self._stage, engine, worker) for engine, worker in staged]
            with self._refusing(StateError, InvalidInput, Unsupported):
                self._streaming.read(reading, self._take_window)
            for future in futures:
                future.result()
            self._proof.compute()

    @contextmanager
    def _refusing(self, *kinds: type[WeightcastError]) -> Iterator[None]:
        """An error of these kinds ends the round and is raised as it is: it says what is wrong with what is published."""
        try:
            yield
        except kinds as error:
            self._refusal = error
            raise

    def _start_proof(self, workers: list[Pair]) -> None:
        keys = {worker.digest_key for _, worker in workers}
        changing = {worker.digest_key for _, worker in workers if worker.codec.changes}
        if self._source.device.type != "cpu":
            changing = set()  # a GPU reads all values in less time than the host looks through what changed
        self._proof.start(keys, self._source.memory, self._check_digesting, changing)

    def _take_window(self, window: int) -> None:
        self._proof.take(window, self._source.memory, self._check_digesting, self._source.filled_digest(window))

    def _check_digesting(self) -> None:
        if self._outcomes.failed:
            raise Cancelled("the round failed elsewhere")
        if self._deadline.passed:
            raise self._deadline.exceeded(
                "digesting the source",
                f"the source was not digested within {self._deadline.timeout_s:g} s",
                phase="verify",
                hint=DIGEST_HINT,
            )

    def _look(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Find what changed before the engine stands still for it, and before the approval says what the digest has to be."""

        def work() -> None:
            if worker.end is not None:
                start = time.perf_counter()
                worker.end.look(self._brief.round, self._transfer_deadline)
                worker.codec.looked_s = time.perf_counter() - start

        self._outcomes.guard(engine, "transfer", work, worker)

    def _stage(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Send (if the worker is pushed to) and wait until the worker has all bytes and their digest."""

        def work() -> None:
            self._delivery.give(engine, worker, Staged, "transfer", self._transfer_deadline)
            self._note_staged(worker, self._delivery.take(engine, worker, Staged, "transfer", self._transfer_deadline))

        try:
            self._outcomes.guard(engine, "transfer", work, worker)
        finally:
            self._delivery.leave(worker)

    def _collect(self, pairs: list[Pair]) -> None:
        """Wait, on one thread, until all these workers, which pull and are sent nothing, have all bytes and their digest."""
        for engine, worker, said in self._delivery.take_each(pairs, Staged, "transfer", self._transfer_deadline):
            self._outcomes.guard(engine, "transfer", partial(self._note_staged, worker, said), worker)

    def _note_staged(self, worker: WorkerLink, said: Message | WeightcastError) -> None:
        if isinstance(said, WeightcastError):
            raise said
        assert isinstance(said, Staged)
        progress = self._outcomes.progress(worker)
        progress.nbytes, progress.seconds, progress.digest = said.nbytes, said.transfer_s, said.digest
        progress.digested = said.digested
        worker.codec.note(said.nbytes, said.transfer_s)
        self._tell_progress()

    def _tell_progress(self) -> None:
        """Say how many workers have all bytes."""
        if self._fleet.progress.is_heard:
            workers = [worker for engine in self._engines for worker in engine.workers if not worker.in_place]
            done = sum(bool(self._outcomes.progress(worker).digest) for worker in workers)
            self._fleet.progress("transfer", done=done, total=len(workers))

    def _verify(self, workers: list[Pair]) -> None:
        with self._timeline.phase("verify"):
            self._proof.settle()
            for engine in self._engines:
                self._outcomes.guard(engine, "verify", partial(self._proof.check_ties, self._ties[engine.name]))
            for engine, worker in workers:
                if not worker.in_place:
                    self._outcomes.guard(engine, "verify", partial(self._check, worker), worker)

    def _check(self, worker: WorkerLink) -> None:
        digest = self._outcomes.progress(worker).digest
        assert digest is not None
        self._proof.check(worker.digest_key, digest, "staged")

    def _commit(self, pool: ThreadPoolExecutor) -> None:
        commits = Commits(self._settings, self._outcomes, self._delivery, self._streaming, self._proof, self._timeline)
        with self._timeline.phase("commit"):
            commits.run(pool, self._engines, self._source.layout.is_streamed)
