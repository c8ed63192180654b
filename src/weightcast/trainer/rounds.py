"""One round, as the trainer runs it: begin, transfer, verify, commit, and the way back when something fails.

    begin     staged workers are told to receive; pulled bytes are made visible first
    transfer  bytes travel while engines serve n; meanwhile the source is digested
    verify    every staged worker's digest must be the source's
    commit    engines make n+1 live between two steps; in-place engines receive now
    (failure) whoever has not committed is told to abort; staged engines that may have are rolled back

Every wait ends by the round's deadline, the way back at most ``UNDO_S`` after it. With require="all" one worker's failure ends
the waits for all others and the round; with "live" the engine is dropped from it and taken back, and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from weightcast.control.coordinator import Coordinator
from weightcast.deadline import Deadline
from weightcast.digest import version_name
from weightcast.errors import (
    DigestMismatch,
    PeerLost,
    RoundFailed,
    StateError,
    TransportError,
    WeightcastError,
)
from weightcast.messages import Abort, Begin, Committed, Message, Staged, Verified
from weightcast.report.model import EngineReport, Phase, Report, WorkerReport
from weightcast.trainer.clients.base import AnswerLost, CommitOrder, CommitReply
from weightcast.trainer.fleet import Fleet
from weightcast.trainer.links import UNKNOWN, EngineLink, WorkerLink
from weightcast.trainer.proof import ExpectedDigest
from weightcast.trainer.sources.base import Source
from weightcast.trainer.timeline import Timeline

logger = logging.getLogger(__name__)

Require = Literal["all", "live"]

UNDO_S = 1.5
"""What taking back may last beyond the round's deadline."""
LIVE_TRANSFER_SHARE = 0.6
"""Share of the time left that a transfer may take where stragglers are dropped: the others still have to commit."""
REPEAT_AFTER_S = 0.2


class _Cancelled(StateError):
    """A wait ended because its engine, or the round, failed elsewhere."""


@dataclass(slots=True)
class _Progress:
    """What is known of one worker in this round."""

    nbytes: int = 0
    seconds: float = 0.0
    digest: int | None = None


@dataclass(slots=True)
class _Outcome:
    """What is known of one engine in this round."""

    error: WeightcastError | None = None
    committed: bool = False
    may_be_committed: bool = False
    phases: list[Phase] = field(default_factory=list)


class Round:
    """One attempt to bring a fleet to the next version. Used once."""

    def __init__(
        self,
        fleet: Fleet,
        engines: list[EngineLink],
        source: Source,
        content: ExpectedDigest,
        coordinator: Coordinator,
        *,
        number: int,
        round: int,
        base: str,
        pause: str,
        clear_cache: bool,
        deadline: Deadline,
        timeline: Timeline,
        require: Require = "all",
        absent: Mapping[str, WeightcastError] | None = None,
    ) -> None:
        self._fleet, self._engines, self._source, self._content = fleet, engines, source, content
        self._coordinator = coordinator
        self._number, self._round, self._epoch, self._base = number, round, fleet.epoch, base
        self._pause, self._clear_cache = pause, clear_cache
        self._deadline, self._timeline = deadline, timeline
        self._require, self._absent = require, dict(absent or {})
        self._transfer_deadline = deadline
        self._progress: dict[tuple[str, int], _Progress] = {}
        self._outcomes = {engine.name: _Outcome() for engine in engines}
        self._failed = threading.Event()
        self._noting = threading.Lock()
        self._expected: dict[str, int] = {}
        self.content_digest = 0
        self.version = ""

    @property
    def was_seen(self) -> bool:
        """Whether an engine may have served this version: then its number is used up."""
        return any(outcome.may_be_committed for outcome in self._outcomes.values())

    def run(self) -> Report:
        """Run the round; raises RoundFailed after everything that could be undone was."""
        workers = [(engine, worker) for engine in self._engines for worker in engine.workers]
        self._coordinator.clear_inboxes(worker.member for _, worker in workers)
        try:
            with ThreadPoolExecutor(2 * max(1, len(workers)) + 1, thread_name_prefix="weightcast-round") as pool:
                digesting = self._transfer(pool, workers)
                if not self._failed.is_set():
                    self._verify(digesting, workers)
                if not self._failed.is_set():
                    self._commit(pool)
        except WeightcastError as error:
            self._fail()
            self._undo(self._engines)
            raise self._failure({"trainer": error}) from error
        except BaseException:
            self._fail()
            self._undo(self._engines)
            raise
        well = [engine for engine in self._engines if self._outcomes[engine.name].committed]
        if self._failed.is_set() or not well:
            self._undo(self._engines)
            raise self._failure({})
        self._undo([engine for engine in self._engines if engine not in well])
        for engine in well:
            engine.version, engine.digest, engine.dirty = self.version, f"{self.content_digest:016x}", False
        return self._report()

    # -- phases

    def _transfer(
        self, pool: ThreadPoolExecutor, workers: list[tuple[EngineLink, WorkerLink]]
    ) -> Future[tuple[int, dict[str, int]]]:
        if self._require == "live":
            self._transfer_deadline = Deadline(max(self._left_s() * LIVE_TRANSFER_SHARE, 0.001))
        with self._timeline.phase("begin"):
            for engine, worker in workers:
                if worker.transport is not None and worker.transport.pulls:
                    self._guarded(engine, "begin", partial(self._send_bytes, worker, self._deadline))
            for _, worker in workers:
                worker.at = (self._epoch, self._round)
                self._tell(
                    worker, Begin(epoch=self._epoch, round=self._round, base=self._base, timeout_s=self._left_s())
                )
        with self._timeline.phase("transfer"):
            digesting = pool.submit(self._digest_source, {worker.digest_key for _, worker in workers})
            staged = [(engine, worker) for engine, worker in workers if not worker.in_place]
            futures = [pool.submit(self._stage, engine, worker) for engine, worker in staged]
            for future in futures:
                future.result()
        return digesting

    def _stage(self, engine: EngineLink, worker: WorkerLink) -> None:
        """Send (if it is pushed) and wait until the worker has all bytes and their digest."""

        def work() -> None:
            if worker.transport is not None and not worker.transport.pulls:
                try:
                    self._send_bytes(worker, self._transfer_deadline)
                except TransportError as error:
                    self._ask_why(engine, worker, error, Staged, "transfer")
            staged = self._take(engine, worker, Staged, "transfer", self._transfer_deadline)
            assert isinstance(staged, Staged)
            progress = _Progress(staged.nbytes, staged.transfer_s, staged.digest)
            self._progress[worker.member.key] = progress

        self._guarded(engine, "transfer", work, worker)

    def _ask_why(
        self, engine: EngineLink, worker: WorkerLink, error: WeightcastError, kind: type[Message], phase: str
    ) -> None:
        """Raise what the worker itself says about a broken connection, or the error when it says nothing."""
        if self._is_over(engine):
            raise _Cancelled("the round failed elsewhere")
        brief = Deadline(min(self._left_s(), UNDO_S))
        with contextlib.suppress(TimeoutError, _Cancelled):
            self._take(engine, worker, kind, phase, brief)
        raise worker.named(error)

    def _is_over(self, engine: EngineLink) -> bool:
        return self._failed.is_set() or self._outcomes[engine.name].error is not None

    def _digest_source(self, keys: set[str]) -> tuple[int, dict[str, int]]:
        memory = self._source.memory
        whole = self._content.of(memory)
        expected = {
            key: whole if self._fleet.expected[key] is self._content else self._fleet.expected[key].of(memory)
            for key in keys
        }
        return whole, expected

    def _verify(
        self, digesting: Future[tuple[int, dict[str, int]]], workers: list[tuple[EngineLink, WorkerLink]]
    ) -> None:
        with self._timeline.phase("verify"):
            self.content_digest, self._expected = digesting.result()
            self.version = version_name(self._number, self._source.manifest, self.content_digest)
            for engine, worker in workers:
                if not worker.in_place:
                    self._guarded(engine, "verify", partial(self._check, worker, "staged"), worker)

    def _check(self, worker: WorkerLink, what: str) -> None:
        digest, expected = self._progress[worker.member.key].digest, self._expected[worker.digest_key]
        if digest != expected:
            raise DigestMismatch(
                f"{what} weights have digest {digest:016x}, the trainer's are {expected:016x}",
                hint="Bytes were lost, torn or changed while they were published",
            )

    def _commit(self, pool: ThreadPoolExecutor) -> None:
        with self._timeline.phase("commit"):
            # In-place first: they may still fail, and staged engines can then simply stay at n.
            groups = [[e for e in self._engines if e.in_place == in_place] for in_place in (True, False)]
            if self._require == "live":
                groups = [self._engines]
            for group in groups:
                if not self._failed.is_set():
                    for future in [pool.submit(self._commit_engine, pool, engine) for engine in group]:
                        future.result()

    def _commit_engine(self, pool: ThreadPoolExecutor, engine: EngineLink) -> None:
        outcome = self._outcomes[engine.name]

        def work() -> None:
            for worker in engine.workers:
                self._tell(worker, self._approval(worker))
            outcome.may_be_committed = True
            start = self._timeline.elapsed_s()
            pushed = [w for w in engine.workers if w.in_place and w.transport is not None and not w.transport.pulls]
            sending = [pool.submit(self._push, engine, worker) for worker in pushed]
            try:
                reply = self._order(engine, outcome)
            except WeightcastError as error:
                self._note(engine, error.at(engine=engine.name, phase="commit", round=self._round))
                for worker in pushed:
                    if worker.end is not None:
                        worker.end.abort()
                raise
            for future in sending:
                future.result()
            for name, seconds in reply.phases.items():
                outcome.phases.append(Phase(name=name, start_s=start, seconds=seconds))
                start += seconds
            for worker in engine.workers:
                self._confirm(engine, worker)
            outcome.committed = outcome.error is None

        self._guarded(engine, "commit", work)

    def _push(self, engine: EngineLink, worker: WorkerLink) -> None:
        def work() -> None:
            try:
                self._send_bytes(worker, self._deadline)
            except TransportError as error:
                self._ask_why(engine, worker, error, Committed, "commit")

        self._guarded(engine, "commit", work, worker)

    def _order(self, engine: EngineLink, outcome: _Outcome) -> CommitReply:
        """Have the engine commit. A lost answer is no lost commit: the order is repeated, as the round's number makes that
        harmless, until the engine answers or a worker is gone."""
        order = CommitOrder(
            epoch=self._epoch,
            round=self._round,
            version=self.version,
            pause=self._pause,
            clear_cache=self._clear_cache,
        )
        first = True
        while True:
            try:
                return engine.client.commit(order, self._deadline)
            except AnswerLost as error:
                logger.info("%s: the answer to the commit was lost: %s", engine.name, str(error))
                if engine.lost() or self._deadline.remaining_s() <= REPEAT_AFTER_S:
                    raise
            except PeerLost as error:
                if first and error.phase is None:
                    outcome.may_be_committed = False  # nobody listens: the order never arrived
                raise
            first = False
            time.sleep(REPEAT_AFTER_S)

    def _approval(self, worker: WorkerLink) -> Verified:
        return Verified(
            epoch=self._epoch,
            round=self._round,
            version=self.version,
            content=f"{self.content_digest:016x}",
            digest=self._expected[worker.digest_key],
        )

    def _confirm(self, engine: EngineLink, worker: WorkerLink) -> None:
        """The live bytes' own digest, taken by the worker after it went live."""
        done = self._take(engine, worker, Committed, "commit", self._deadline, cancellable=False)
        assert isinstance(done, Committed)
        progress = self._progress.setdefault(worker.member.key, _Progress())
        progress.digest = done.digest
        if worker.in_place:
            progress.nbytes, progress.seconds = done.nbytes, done.transfer_s
        self._check(worker, "live")

    # -- pieces

    def _left_s(self) -> float:
        return max(self._deadline.remaining_s(), 0.001)

    def _send_bytes(self, worker: WorkerLink, deadline: Deadline) -> None:
        if worker.end is not None:
            worker.end.send(deadline)

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
    ) -> Message:
        def is_this_round(message: Message) -> bool:
            return (getattr(message, "epoch", 0), getattr(message, "round", 0)) == (self._epoch, self._round)

        def cancelled() -> WeightcastError | None:
            if cancellable and self._is_over(engine):
                return _Cancelled("the round failed elsewhere")
            return None

        return self._coordinator.take(
            worker.member, kind, deadline, phase=phase, matches=is_this_round, cancelled=cancelled
        )

    def _guarded(
        self, engine: EngineLink, phase: str, work: Callable[[], object], worker: WorkerLink | None = None
    ) -> None:
        """Run a step of one engine; its first failure is noted and drops the engine, or ends the round for all."""
        outcome = self._outcomes[engine.name]
        if outcome.error is not None or (self._failed.is_set() and not outcome.may_be_committed):
            return
        try:
            work()
        except _Cancelled:
            return
        except WeightcastError as error:
            rank = worker.member.rank if worker is not None else None
            error.at(engine=engine.name, worker=rank, phase=phase, round=self._round)
            self._note(engine, error)
        except BaseException:
            self._fail()
            raise

    def _note(self, engine: EngineLink, error: WeightcastError) -> None:
        with self._noting:
            outcome = self._outcomes[engine.name]
            # What broke because the round was called off is no cause of its failing.
            if outcome.error is None and not (self._failed.is_set() and not outcome.may_be_committed):
                outcome.error = error
                logger.warning("round %d.%d: %s", self._epoch, self._round, str(error))
        if self._require == "all" or all(outcome.error is not None for outcome in self._outcomes.values()):
            self._fail()
        else:
            self._end_transfers(engine)

    def _fail(self) -> None:
        if not self._failed.is_set():
            self._failed.set()
            for engine in self._engines:
                self._end_transfers(engine)

    @staticmethod
    def _end_transfers(engine: EngineLink) -> None:
        """Wake whoever sends to staged workers. In-place ones receive inside their commit: cut off, they would be dirty."""
        for worker in engine.workers:
            pushes = worker.transport is not None and not worker.transport.pulls
            if worker.end is not None and pushes and not worker.in_place:
                worker.end.abort()

    # -- the way back

    def _undo(self, engines: list[EngineLink]) -> None:
        if not engines:
            return
        deadline = Deadline(self._deadline.remaining_s() + UNDO_S)
        with self._timeline.phase("undo"), ThreadPoolExecutor(len(engines)) as pool:
            for future in [pool.submit(self._undo_engine, engine, deadline) for engine in engines]:
                future.result()

    def _undo_engine(self, engine: EngineLink, deadline: Deadline) -> None:
        outcome = self._outcomes[engine.name]
        abort = Abort(epoch=self._epoch, round=self._round, reason="the trainer called it off")
        for worker in engine.workers:
            self._tell(worker, abort)
        if outcome.may_be_committed:
            self._take_back(engine, outcome, deadline)
        if outcome.error is not None or not self._is_reusable(engine):
            engine.broken = "its last round failed"

    def _is_reusable(self, engine: EngineLink) -> bool:
        """Whether all pairs can be used again: a transfer that was cut off leaves a dead one."""
        return all(
            worker.transport is not None
            and worker.transport.pulls
            and (worker.in_place or worker.member.key in self._progress)
            for worker in engine.workers
        )

    def _take_back(self, engine: EngineLink, outcome: _Outcome, deadline: Deadline) -> None:
        """Have an engine return to version n, or never leave it, and ask what it serves now."""
        try:
            try:
                engine.client.rollback(self._epoch, self._round, deadline)
            except StateError:
                if not engine.in_place:
                    raise
            status = engine.client.status(deadline)
            engine.version, engine.dirty = str(status["weight_version"]), bool(status["dirty"])
        except WeightcastError as error:
            logger.warning("%s could not be taken back: %s", engine.name, str(error))
            outcome.error = outcome.error or error.at(engine=engine.name, phase="undo", round=self._round)
            engine.version, engine.dirty = UNKNOWN, engine.in_place

    def _failure(self, causes: dict[str, WeightcastError]) -> RoundFailed:
        causes |= {name: outcome.error for name, outcome in self._outcomes.items() if outcome.error is not None}
        causes = self._absent | causes
        phase = next(iter(causes.values())).phase if causes else None
        return RoundFailed(
            f"version {self._number} was not published",
            round=self._round,
            phase=phase,
            causes=causes,
            serving={engine.name: engine.version for engine in self._fleet.engines if not engine.dirty},
            dirty=tuple(engine.name for engine in self._fleet.engines if engine.dirty),
            hint="Call publish() again: it sets up what broke",
        )

    # -- the report

    def _report(self) -> Report:
        present = {*self._outcomes, *self._absent}
        engines = tuple(self._engine_report(engine) for engine in self._fleet.engines if engine.name in present)
        modes = {worker.landings.mode for engine in self._engines for worker in engine.workers}
        return Report(
            version=self.version,
            number=self._number,
            epoch=self._epoch,
            round=self._round,
            digest=f"{self.content_digest:016x}",
            mode=modes.pop() if len(modes) == 1 else "mixed",
            nbytes=sum(worker.nbytes for engine in engines for worker in engine.workers),
            total_s=self._timeline.elapsed_s(),
            outcome="committed",
            phases=self._timeline.phases,
            engines=engines,
        )

    def _engine_report(self, engine: EngineLink) -> EngineReport:
        outcome = self._outcomes.get(engine.name) or _Outcome(error=self._absent[engine.name])
        workers = []
        for worker in engine.workers if engine.name in self._outcomes else ():
            progress = self._progress.get(worker.member.key, _Progress())
            workers.append(
                WorkerReport(
                    rank=worker.member.rank,
                    transport=worker.transport.name if worker.transport is not None else "none",
                    reason=worker.reason,
                    nbytes=progress.nbytes,
                    seconds=progress.seconds,
                    digest=f"{progress.digest or 0:016x}",
                )
            )
        return EngineReport(
            name=engine.name,
            kind=engine.client.kind,
            version=engine.version,
            ok=outcome.error is None,
            error=None if outcome.error is None else str(outcome.error),
            # Every worker proved its own part; together that is the published content.
            digest=f"{self.content_digest:016x}" if outcome.committed else None,
            phases=tuple(outcome.phases),
            workers=tuple(workers),
        )
