"""One round, as the trainer runs it: begin, transfer, verify, commit, and the way back when something fails.

    begin     staged workers are told to receive; pulled bytes are made visible first
    transfer  bytes travel while engines serve n; meanwhile the source is digested
    verify    every staged worker's digest must be the source's
    commit    engines make n+1 live between two steps; in-place engines receive now
    (failure) whoever has not committed is told to abort; staged engines that have are rolled back

Every wait ends by the round's deadline; one worker's failure ends the waits for all others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from weightcast.control.coordinator import Coordinator
from weightcast.deadline import Deadline
from weightcast.digest import version_name
from weightcast.errors import DigestMismatch, RoundFailed, StateError, WeightcastError
from weightcast.messages import Abort, Begin, Committed, Message, Staged, Verified
from weightcast.report.model import EngineReport, Phase, Report, WorkerReport
from weightcast.trainer.clients.base import CommitOrder
from weightcast.trainer.fleet import EngineLink, Fleet, WorkerLink
from weightcast.trainer.proof import ExpectedDigest
from weightcast.trainer.sources.base import Source
from weightcast.trainer.timeline import Timeline

logger = logging.getLogger(__name__)

ROLLBACK_TIMEOUT_S = 10.0


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
    commit_called: bool = False
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
    ) -> None:
        self._fleet, self._engines, self._source, self._content = fleet, engines, source, content
        self._coordinator = coordinator
        self._number, self._round, self._epoch, self._base = number, round, fleet.epoch, base
        self._pause, self._clear_cache = pause, clear_cache
        self._deadline, self._timeline = deadline, timeline
        self._progress: dict[tuple[str, int], _Progress] = {}
        self._outcomes = {engine.name: _Outcome() for engine in engines}
        self._failed = threading.Event()
        self._expected: dict[str, int] = {}
        self.content_digest = 0
        self.version = ""

    def run(self) -> Report:
        """Run the round; raises RoundFailed after everything that could be undone was."""
        workers = [(engine, worker) for engine in self._engines for worker in engine.workers]
        with ThreadPoolExecutor(2 * max(1, len(workers)) + 1, thread_name_prefix="weightcast-round") as pool:
            digesting = self._transfer(pool, workers)
            if not self._failed.is_set():
                self._verify(digesting, workers)
            if not self._failed.is_set():
                self._commit(pool)
        if self._failed.is_set():
            self._undo()
            raise self._failure()
        for engine in self._engines:
            engine.version, engine.digest, engine.dirty = self.version, f"{self.content_digest:016x}", False
        return self._report("committed")

    # -- phases

    def _transfer(
        self, pool: ThreadPoolExecutor, workers: list[tuple[EngineLink, WorkerLink]]
    ) -> Future[tuple[int, dict[str, int]]]:
        with self._timeline.phase("begin"):
            for engine, worker in workers:
                if worker.transport is not None and worker.transport.pulls:
                    self._guarded(engine, "begin", partial(self._send_bytes, worker))
            for _, worker in workers:
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
                self._send_bytes(worker)
            staged = self._take(worker, Staged, "transfer")
            assert isinstance(staged, Staged)
            progress = _Progress(staged.nbytes, staged.transfer_s, staged.digest)
            self._progress[worker.member.key] = progress

        self._guarded(engine, "transfer", work, worker)

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
            for in_place in (True, False):
                group = [engine for engine in self._engines if engine.in_place == in_place]
                if group and not self._failed.is_set():
                    for future in [pool.submit(self._commit_engine, pool, engine) for engine in group]:
                        future.result()

    def _commit_engine(self, pool: ThreadPoolExecutor, engine: EngineLink) -> None:
        outcome = self._outcomes[engine.name]

        def work() -> None:
            for worker in engine.workers:
                self._tell(worker, self._approval(worker))
            outcome.commit_called = True
            start = self._timeline.elapsed_s()
            pushed = [w for w in engine.workers if w.in_place and w.transport is not None and not w.transport.pulls]
            sending = [pool.submit(self._guarded, engine, "commit", partial(self._send_bytes, w), w) for w in pushed]
            order = CommitOrder(
                epoch=self._epoch,
                round=self._round,
                version=self.version,
                pause=self._pause,
                clear_cache=self._clear_cache,
            )
            reply = engine.client.commit(order, self._deadline)
            for future in sending:
                future.result()
            for name, seconds in reply.phases.items():
                outcome.phases.append(Phase(name=name, start_s=start, seconds=seconds))
                start += seconds
            for worker in engine.workers:
                self._confirm(worker)
            outcome.committed = True

        self._guarded(engine, "commit", work)

    def _approval(self, worker: WorkerLink) -> Verified:
        return Verified(
            epoch=self._epoch,
            round=self._round,
            version=self.version,
            content=f"{self.content_digest:016x}",
            digest=self._expected[worker.digest_key],
        )

    def _confirm(self, worker: WorkerLink) -> None:
        """The live bytes' own digest, taken by the worker after it went live."""
        done = self._take(worker, Committed, "commit", cancellable=False)
        assert isinstance(done, Committed)
        progress = self._progress.setdefault(worker.member.key, _Progress())
        progress.digest = done.digest
        if worker.in_place:
            progress.nbytes, progress.seconds = done.nbytes, done.transfer_s
        self._check(worker, "live")

    # -- pieces

    def _left_s(self) -> float:
        return max(self._deadline.remaining_s(), 0.001)

    def _send_bytes(self, worker: WorkerLink) -> None:
        if worker.end is not None:
            worker.end.send(self._deadline)

    def _tell(self, worker: WorkerLink, message: Message) -> None:
        self._coordinator.send(worker.member, message)

    def _take(self, worker: WorkerLink, kind: type[Message], phase: str, *, cancellable: bool = True) -> Message:
        def is_this_round(message: Message) -> bool:
            return (getattr(message, "epoch", 0), getattr(message, "round", 0)) == (self._epoch, self._round)

        def cancelled() -> WeightcastError | None:
            if cancellable and self._failed.is_set():
                return StateError("the round failed elsewhere")
            return None

        return self._coordinator.take(
            worker.member, kind, self._deadline, phase=phase, matches=is_this_round, cancelled=cancelled
        )

    def _guarded(
        self, engine: EngineLink, phase: str, work: Callable[[], object], worker: WorkerLink | None = None
    ) -> None:
        """Run a step of one engine; its failure is noted and ends the round for all."""
        outcome = self._outcomes[engine.name]
        try:
            work()
        except WeightcastError as error:
            first = not self._failed.is_set()
            rank = worker.member.rank if worker is not None else None
            error.at(engine=engine.name, worker=rank, phase=phase, round=self._round)
            if outcome.error is None and (first or not isinstance(error, StateError)):
                outcome.error = error
            self._fail()
        except BaseException:
            self._fail()
            raise

    def _fail(self) -> None:
        if not self._failed.is_set():
            self._failed.set()
            for engine in self._engines:
                for worker in engine.workers:
                    if worker.end is not None and worker.transport is not None and not worker.transport.pulls:
                        worker.end.abort()

    # -- the way back

    def _undo(self) -> None:
        with self._timeline.phase("undo"):
            abort = Abort(epoch=self._epoch, round=self._round, reason="the round failed")
            for engine in self._engines:
                outcome = self._outcomes[engine.name]
                for worker in engine.workers:
                    self._tell(worker, abort)
                if outcome.commit_called:
                    self._take_back(engine, outcome)
                if outcome.error is not None or not _all_pull(engine):
                    engine.broken = "its last round failed"

    def _take_back(self, engine: EngineLink, outcome: _Outcome) -> None:
        """Roll back a staged engine that committed, and ask any other what it serves now."""
        deadline = Deadline(ROLLBACK_TIMEOUT_S)
        try:
            if not engine.in_place and self._serves(engine, deadline) == self.version:
                engine.client.rollback(self._epoch, self._round, deadline)
            status = engine.client.status(deadline)
            engine.version, engine.dirty = str(status["weight_version"]), bool(status["dirty"])
        except WeightcastError as error:
            logger.warning("%s could not be taken back: %s", engine.name, error)
            outcome.error = outcome.error or error
            engine.version, engine.dirty = "unknown", engine.in_place

    def _serves(self, engine: EngineLink, deadline: Deadline) -> str:
        return str(engine.client.status(deadline)["weight_version"])

    def _failure(self) -> RoundFailed:
        causes = {name: outcome.error for name, outcome in self._outcomes.items() if outcome.error is not None}
        phase = next(iter(causes.values())).phase if causes else None
        return RoundFailed(
            f"version {self._number} was not published",
            round=self._round,
            phase=phase,
            causes=causes,
            serving={engine.name: engine.version for engine in self._engines if not engine.dirty},
            dirty=tuple(engine.name for engine in self._engines if engine.dirty),
            hint="Call publish() again: it sets up what broke",
        )

    # -- the report

    def _report(self, outcome: str) -> Report:
        engines = tuple(self._engine_report(engine) for engine in self._engines)
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
            outcome="committed" if outcome == "committed" else "aborted",
            phases=self._timeline.phases,
            engines=engines,
        )

    def _engine_report(self, engine: EngineLink) -> EngineReport:
        outcome = self._outcomes[engine.name]
        workers = []
        for worker in engine.workers:
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


def _all_pull(engine: EngineLink) -> bool:
    return all(worker.transport is not None and worker.transport.pulls for worker in engine.workers)
