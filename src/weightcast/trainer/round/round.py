"""One round, as the trainer runs it: begin, transfer, verify, commit, and the way back when something fails.

    begin     staged workers are told to receive; pulled bytes are made visible first. The source's digest is started, and what
              the source checks last is checked while a GPU computes it
    transfer  bytes travel while engines serve n; meanwhile the source is digested. A stream is read here, window by window (see reading)
    verify    every staged worker's digest must be the source's
    commit    engines make n+1 live between two steps; in-place engines receive now. For them a stream is read a second time
    (failure) whoever has not committed is told to abort; staged engines that may have are rolled back

The thread that calls does whatever nobody else could do meanwhile: a fleet of one engine needs no other thread, whose start
and end would take longer than the control messages do.

Every wait ends by the round's deadline, the way back at most ``UNDO_S`` after it. With require="all" one worker's failure ends
the waits for all others and the round; with "live" the engine is dropped from it and taken back, and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from weightcast.deadline import Deadline
from weightcast.errors import (
    AnswerLost,
    DeadlineExceeded,
    GroupBroken,
    InvalidInput,
    PeerLost,
    StateError,
    TransportError,
    Unsupported,
    WeightcastError,
)
from weightcast.messages import Abort, Begin, Committed, Filled, Message, Read, Staged, Verified
from weightcast.report.model import Phase, Report
from weightcast.trainer.clients.base import CommitOrder, CommitReply
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import Cancelled, EngineProgress, RoundBook
from weightcast.trainer.round.account import Account
from weightcast.trainer.round.proof import RoundProof
from weightcast.trainer.round.reading import Reading
from weightcast.trainer.round.timeline import Timeline
from weightcast.trainer.round.undo import WayBack
from weightcast.trainer.round.windows import WindowTurns

logger = logging.getLogger(__name__)

UNDO_S = 1.0
"""What taking back may last beyond the round's deadline."""
LIVE_TRANSFER_SHARE = 0.6
"""Share of the time left that a transfer may take where stragglers are dropped: the others still have to commit."""
UNDO_AT_LEAST_S = 0.3
REPEAT_AFTER_S = 0.2
IN_PLACE_TWICE = (
    "an iterator that was given to publish() can be read once, and engines without a staged copy need it twice"
)
STAGED_HINT = (
    "Give the Publisher the function that makes the iterator\n"
    "Or let the engine have a staged copy: mode='staged', or more free memory on its device"
)
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
        self._source, self._coordinator, self._settings = fleet.source, fleet.coordinator, fleet.settings
        self._number, self._round, self._epoch = brief.number, brief.round, fleet.epoch
        self._deadline, self._timeline = brief.deadline, brief.timeline
        self._refusal: WeightcastError | None = None
        self._transfer_deadline = brief.deadline
        self._outcomes = RoundBook(engines, self._settings.require, self._epoch, self._round)
        self._turns = WindowTurns()
        self._account = Account(self._outcomes, brief.absent, number=self._number, epoch=self._epoch, round=self._round)
        self._ties = {engine.name: fleet.ties.doubtful(engine) for engine in engines}
        compared = {tie: fleet.ties.digests(tie, brief.deadline) for ties in self._ties.values() for tie in ties}
        self._proof = RoundProof(
            fleet.content(brief.deadline), fleet.expected, fleet.ranks.manifest, self._number, compared
        )
        self._is_committed = False
        self._report: Report | None = None

    @property
    def was_seen(self) -> bool:
        """Whether an engine may have served this version: then its number is used up."""
        return self._outcomes.was_seen

    def run(self) -> Report:
        """Run the round; raises RoundFailed after everything that could be undone was, or what ``check`` raised."""
        # The caller's mode is for its own tensors: those made here, for later rounds, too, are plain ones.
        with torch.inference_mode(False):
            return self._run()

    def _run(self) -> Report:
        workers = [(engine, worker) for engine in self._engines for worker in engine.workers]
        self._coordinator.clear_inboxes(worker.member for _, worker in workers)
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
            losses = self._fleet.ranks.losses("transfer")
            raise self._account.failure(self._fleet.engines, losses or {"trainer": error}) from error
        except BaseException:
            self._outcomes.fail()
            self._undo(self._engines)
            raise
        well = [engine for engine in self._engines if self._outcomes.of(engine).committed]
        if self._outcomes.failed or not well:
            self._undo(self._engines)
            failure = self._account.failure(self._fleet.engines, self._fleet.ranks.losses("transfer"))
            raise failure from next(iter(failure.causes.values()), None)
        self._undo([engine for engine in self._engines if engine not in well])
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
                version=self._proof.version or str(self._number),
                digest=self._proof.content,
                outcome="committed" if self._is_committed else "aborted",
                non_finite=self._brief.non_finite,
                own_nbytes=self._source.own_nbytes,
            )
        return self._report

    def _undo(self, engines: list[EngineLink]) -> None:
        if engines:
            way_back = WayBack(self._outcomes, self._coordinator, epoch=self._epoch, round=self._round)
            with self._timeline.phase("undo"):
                # Counted from the round's deadline, whatever was needed to end its transfers.
                way_back.take(engines, Deadline(max(self._deadline.at + UNDO_S - time.monotonic(), UNDO_AT_LEAST_S)))

    # -- phases

    def _transfer(self, pool: ThreadPoolExecutor, workers: list[tuple[EngineLink, WorkerLink]]) -> None:
        if self._settings.require == "live":
            self._transfer_deadline = self._deadline.part(LIVE_TRANSFER_SHARE)
        staged = [(engine, worker) for engine, worker in workers if not worker.in_place]
        in_place = [(engine, worker) for engine, worker in workers if worker.in_place]
        if self._source.layout.is_streamed:
            self._transfer_stream(pool, workers)
            return
        with self._timeline.phase("begin"):
            # Before the digest: making bytes visible waits for the trainer's GPU, which would have to digest first.
            self._show(staged)
            self._tell_begin(staged)
            keys = {worker.digest_key for _, worker in workers}
            self._proof.start(keys, self._source.memory, self._check_digesting)
            self._tell_begin(in_place)
            try:
                self._brief.check()
            except WeightcastError as error:
                self._refusal = error
                raise
            self._show(in_place)
        with self._timeline.phase("transfer"):
            self._turns.fill(0)
            only = staged[0] if len(staged) == 1 and staged[0][1].pulls else None
            futures = [] if only else [pool.submit(self._stage, engine, worker) for engine, worker in staged]
            if staged:
                self._proof.compute()
            if only:
                self._stage(*only)
            for future in futures:
                future.result()

    def _transfer_stream(self, pool: ThreadPoolExecutor, workers: list[tuple[EngineLink, WorkerLink]]) -> None:
        """Stage what the stream yields, and digest it. In-place engines read the stream once more, in their commit."""
        staged = [(engine, worker) for engine, worker in workers if not worker.in_place]
        with self._timeline.phase("begin"):
            if self._source.is_spent and len(staged) < len(workers):
                self._refusal = Unsupported(IN_PLACE_TWICE, hint=STAGED_HINT)
                raise self._refusal
            self._tell_begin(workers)
            self._proof.start({worker.digest_key for _, worker in workers}, self._source.memory, self._check_digesting)
        with self._timeline.phase("transfer"):
            reading = self._new_reading(staged)
            futures = [pool.submit(self._stage, engine, worker) for engine, worker in staged]
            try:
                reading.run(
                    self._show_window,
                    lambda window: self._proof.take(window, self._source.memory, self._check_digesting),
                )
            except Cancelled:
                pass  # an engine failed, whose outcome says why
            except BaseException as error:
                if isinstance(error, StateError | InvalidInput | Unsupported):
                    self._refusal = error
                self._outcomes.fail()
                reading.turns.wake()
                raise
            for future in futures:
                future.result()
            self._proof.compute()

    def _new_reading(self, workers: list[tuple[EngineLink, WorkerLink]]) -> Reading:
        reading = Reading(self._fleet, self._outcomes, workers, self._deadline)
        self._turns = reading.turns
        return reading

    def _show_window(self, workers: Sequence[tuple[EngineLink, WorkerLink]], window: int) -> None:
        """A window is filled: have workers read it."""
        self._show(workers, window)
        for _, worker in workers:
            if worker.pulls:
                self._tell(worker, Filled(epoch=self._epoch, round=self._round, window=window))

    def _show(self, workers: Sequence[tuple[EngineLink, WorkerLink]], part: int = 0) -> None:
        """Make the values of a part visible to those who pull them."""
        for engine, worker in workers:
            if worker.pulls:
                self._outcomes.guard(engine, "begin", partial(self._show_one, engine, worker, part))

    def _show_one(self, engine: EngineLink, worker: WorkerLink, part: int) -> None:
        try:
            self._send_bytes(worker, self._deadline, part)
        except TransportError as error:
            self._ask_why(engine, worker, error, Committed if worker.in_place else Staged, "begin")

    def _tell_begin(self, workers: list[tuple[EngineLink, WorkerLink]]) -> None:
        for engine, worker in workers:
            worker.at = (self._epoch, self._round)
            timeout_s = self._deadline.limit_s()
            self._tell(worker, Begin(epoch=self._epoch, round=self._round, base=engine.base, timeout_s=timeout_s))

    def _stage(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Send (if it is pushed) and wait until the worker has all bytes and their digest."""

        def work() -> None:
            for part in worker.parts:
                self._give(engine, worker, part, Staged, "transfer", self._transfer_deadline)
            staged = self._take(engine, worker, Staged, "transfer", self._transfer_deadline)
            assert isinstance(staged, Staged)
            progress = self._outcomes.progress(worker)
            progress.nbytes, progress.seconds, progress.digest = staged.nbytes, staged.transfer_s, staged.digest
            self._tell_progress()

        try:
            self._outcomes.guard(engine, "transfer", work, worker)
        finally:
            self._turns.leave(worker.member.key)

    def _tell_progress(self) -> None:
        """Say how many workers have all bytes."""
        if self._fleet.progress.is_heard:
            workers = [worker for engine in self._engines for worker in engine.workers if not worker.in_place]
            done = sum(bool(self._outcomes.progress(worker).digest) for worker in workers)
            self._fleet.progress("transfer", done=done, total=len(workers))

    def _give(
        self, engine: EngineLink, worker: WorkerLink, part: int, kind: type[Message], phase: str, deadline: Deadline
    ) -> None:
        """Have the worker get one part; its memory may be overwritten then, if the part is a window of a stream. ``kind`` is what the
        worker says when it has all of them."""
        self._turns.wait_filled(part, deadline, partial(self._over, engine))
        if not worker.pulls:
            try:
                self._send_bytes(worker, deadline, part)
            except TransportError as error:
                self._ask_why(engine, worker, error, kind, phase)
        elif self._source.layout.is_streamed:
            self._take(
                engine, worker, Read, phase, deadline, matches=lambda told: getattr(told, "window", part) == part
            )
        self._turns.release(worker.member.key, part)

    def _over(self, engine: EngineLink) -> WeightcastError | None:
        return Cancelled("the round failed elsewhere") if self._outcomes.is_over(engine) else None

    def _ask_why(
        self, engine: EngineLink, worker: WorkerLink, error: WeightcastError, kind: type[Message], phase: str
    ) -> None:
        """Raise what the worker itself says about a broken connection, or the error when it says nothing."""
        if self._outcomes.is_over(engine) or isinstance(error, GroupBroken):
            raise Cancelled("the round failed elsewhere")
        lost = self._fleet.ranks.lost(phase)
        if lost is not None:
            raise lost
        brief = self._deadline.part(at_most_s=UNDO_S)
        with contextlib.suppress(TimeoutError, Cancelled):
            self._take(engine, worker, kind, phase, brief)
        named = worker.named(error)
        if named is error:
            raise error
        raise named from error

    def _check_digesting(self) -> None:
        if self._outcomes.failed:
            raise Cancelled("the round failed elsewhere")
        if self._deadline.passed:
            raise DeadlineExceeded(
                f"the source was not digested within {self._deadline.timeout_s:g} s", phase="verify", hint=DIGEST_HINT
            )

    def _verify(self, workers: list[tuple[EngineLink, WorkerLink]]) -> None:
        with self._timeline.phase("verify"):
            self._proof.settle()
            for engine in self._engines:
                self._outcomes.guard(engine, "verify", partial(self._proof.check_ties, self._ties[engine.name]))
            for engine, worker in workers:
                if not worker.in_place:
                    self._outcomes.guard(engine, "verify", partial(self._check, worker, "staged"), worker)

    def _check(self, worker: WorkerLink, what: str) -> None:
        digest = self._outcomes.progress(worker).digest
        assert digest is not None
        self._proof.check(worker.digest_key, digest, what)

    def _commit(self, pool: ThreadPoolExecutor) -> None:
        with self._timeline.phase("commit"):
            # In-place first: they may still fail, and staged engines can then simply stay at n.
            groups = [[e for e in self._engines if e.in_place == in_place] for in_place in (True, False)]
            if self._settings.require == "live":
                groups = [self._engines]
            for group in groups:
                reading = self._in_place_reading(group)
                if len(group) == 1 and not reading and not self._outcomes.failed:
                    self._commit_engine(pool, group[0])
                elif not self._outcomes.failed:
                    futures = [pool.submit(self._commit_engine, pool, engine) for engine in group]
                    if reading:
                        self._read_in_place(reading, [engine for engine in group if engine.in_place])
                    for future in futures:
                        future.result()

    def _in_place_reading(self, engines: list[EngineLink]) -> Reading | None:
        """Of a stream, for those of the engines that write it where it goes live; None where there is none."""
        if not self._source.layout.is_streamed:
            return None
        present = [engine for engine in engines if engine.in_place and not self._outcomes.is_over(engine)]
        workers = [(engine, worker) for engine in present for worker in engine.workers if worker.in_place]
        return self._new_reading(workers) if workers else None

    def _read_in_place(self, reading: Reading, engines: list[EngineLink]) -> None:
        """Read the stream once more, while these engines stand still and write it. Where it fails they are dirty, and say so."""
        try:
            reading.run(self._show_window, lambda window: None)
        except Cancelled:
            pass  # an engine failed, whose outcome says why
        except BaseException as error:
            for engine in engines:
                told = error if isinstance(error, WeightcastError) else None
                text = f"the stream failed when it was read for the commit: {told.message if told else error!r}"
                self._outcomes.note(engine, StateError(text, engine=engine.name, phase="commit", round=self._round))
                self._end_commit(engine)
            reading.turns.wake()
            if not isinstance(error, Exception):
                raise

    def _end_commit(self, engine: EngineLink) -> None:
        """Have an engine's commit wait for no more bytes."""
        abort = Abort(epoch=self._epoch, round=self._round, reason="the stream failed")
        for worker in engine.workers:
            self._tell(worker, abort)
            if worker.end is not None and worker.in_place and not worker.pulls:
                worker.end.abort()

    def _commit_engine(self, pool: ThreadPoolExecutor, engine: EngineLink) -> None:
        outcome = self._outcomes.of(engine)

        def work() -> None:
            for worker in engine.workers:
                self._tell(worker, self._approval(worker))
            outcome.may_be_committed = True
            start = self._timeline.elapsed_s()
            is_streamed = self._source.layout.is_streamed
            fed = [worker for worker in engine.workers if worker.in_place and (is_streamed or not worker.pulls)]
            feeding = [pool.submit(self._feed, engine, worker) for worker in fed]
            try:
                reply = self._order(engine, outcome)
            except WeightcastError as error:
                where = {"engine": engine.name, "worker": engine.suspect(), "phase": "commit", "round": self._round}
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

        try:
            self._outcomes.guard(engine, "commit", work)
        finally:
            for worker in engine.workers:
                self._turns.leave(worker.member.key)

    def _feed(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Give an in-place worker what it cannot fetch by itself while its engine's commit runs."""

        def work() -> None:
            for part in worker.parts:
                self._give(engine, worker, part, Committed, "commit", self._deadline)

        try:
            self._outcomes.guard(engine, "commit", work, worker)
        finally:
            self._turns.leave(worker.member.key)

    def _order(self, engine: EngineLink, outcome: EngineProgress) -> CommitReply:
        """Have the engine commit. A lost answer is no lost commit: the order is repeated, as the round's number makes that
        harmless, until the engine answers or a worker is gone."""
        order = CommitOrder(
            epoch=self._epoch,
            round=self._round,
            version=self._proof.version,
            pause=self._settings.pause,
            clear_cache=self._settings.clear_cache,
        )
        first, lost = True, None
        while True:
            try:
                with engine.while_there(self._deadline) as waiting:
                    return engine.client.commit(order, waiting)
            except DeadlineExceeded as error:
                if lost is not None:
                    raise lost from error  # that is what happened; the repetition only ran out of time
                raise
            except AnswerLost as error:
                lost = error
                logger.info("%s: the answer to the commit was lost: %s", engine.name, str(error))
                if engine.lost() or self._deadline.remaining_s() <= REPEAT_AFTER_S:
                    raise
            except PeerLost as error:
                if first and not error.reached:
                    outcome.may_be_committed = False  # nobody listens: the order never arrived
                raise
            first = False
            time.sleep(REPEAT_AFTER_S)

    def _approval(self, worker: WorkerLink) -> Verified:
        return Verified(
            epoch=self._epoch,
            round=self._round,
            version=self._proof.version,
            content=f"{self._proof.content:016x}",
            digest=self._proof.expected[worker.digest_key],
        )

    def _confirm(self, engine: EngineLink, worker: WorkerLink) -> None:
        """The live bytes' own digest, taken by the worker after it went live."""
        done = self._take(engine, worker, Committed, "commit", self._deadline, cancellable=False)
        assert isinstance(done, Committed)
        progress = self._outcomes.progress(worker)
        progress.digest = done.digest
        if worker.in_place:
            progress.nbytes, progress.seconds = done.nbytes, done.transfer_s
        self._check(worker, "live")

    # -- pieces

    def _send_bytes(self, worker: WorkerLink, deadline: Deadline, part: int = 0) -> None:
        if worker.end is not None:
            worker.end.send(deadline, part)

    def _tell(self, worker: WorkerLink, message: Message) -> None:
        self._coordinator.send(worker.member, message)

    def _take(
        self,
        engine: EngineLink,
        worker: WorkerLink,
        kind: type[Message],
        phase: str,
        deadline: Deadline,
        *,
        cancellable: bool = True,
        matches: Callable[[Message], bool] = lambda _: True,
    ) -> Message:
        def is_this_round(message: Message) -> bool:
            at = (getattr(message, "epoch", 0), getattr(message, "round", 0))
            return at == (self._epoch, self._round) and matches(message)

        def cancelled() -> WeightcastError | None:
            return self._over(engine) if cancellable else None

        return self._coordinator.take(
            worker.member, kind, deadline, phase=phase, matches=is_this_round, cancelled=cancelled
        )
