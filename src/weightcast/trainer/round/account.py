"""The account of a round: the Report of one that committed, the RoundFailed of one that did not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightcast.errors import PeerLost, RoundFailed, WeightcastError, hint_of
from weightcast.report.model import EngineReport, Report, WorkerReport
from weightcast.report.model import Outcome as ReportOutcome
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.fleet.round_book import EngineProgress, RoundBook
from weightcast.trainer.round.timeline import Timeline

AGAIN_HINT = "Call publish() again: it sets up what broke"


class Account:
    """Says what came of one round, of its own engines and of those that were ``absent`` from it."""

    def __init__(
        self, outcomes: RoundBook, absent: Mapping[str, WeightcastError], *, number: int, epoch: int, round: int
    ) -> None:
        self._outcomes, self._absent = outcomes, dict(absent)
        self._number, self._epoch, self._round = number, epoch, round

    def failure(self, fleet: Sequence[EngineLink], causes: Mapping[str, WeightcastError]) -> RoundFailed:
        """Why the round failed, and what the whole fleet serves now."""
        every = self._absent | dict(causes) | self._outcomes.errors
        return RoundFailed(
            f"version {self._number} was not published",
            round=self._round,
            phase=next(iter(every.values())).phase if every else None,
            causes=every,
            serving={engine.name: engine.version for engine in fleet if not engine.dirty},
            dirty=tuple(engine.name for engine in fleet if engine.dirty),
            hint=next(
                (c.hint for c in causes.values() if isinstance(c, PeerLost) and c.hint), hint_of(every, AGAIN_HINT)
            ),
        )

    def report(
        self,
        fleet: Sequence[EngineLink],
        timeline: Timeline,
        *,
        version: str,
        digest: int,
        outcome: ReportOutcome = "committed",
        non_finite: Mapping[str, int] | None = None,
        own_nbytes: int = 0,
        held_s: float | None = None,
    ) -> Report:
        """What the round did, engine by engine."""
        hexadecimal = f"{digest:016x}"
        present = [engine for engine in fleet if engine in self._outcomes or engine.name in self._absent]
        engines = tuple(self._engine(engine, hexadecimal) for engine in present)
        modes = {worker.landings.mode for engine in fleet if engine in self._outcomes for worker in engine.workers}
        return Report(
            version=version,
            number=self._number,
            epoch=self._epoch,
            round=self._round,
            digest=hexadecimal,
            mode=modes.pop() if len(modes) == 1 else "mixed",
            nbytes=sum(worker.nbytes for engine in engines for worker in engine.workers),
            total_s=timeline.elapsed_s(),
            outcome=outcome,
            phases=timeline.phases,
            engines=engines,
            unused=_joined(engine.places.unused for engine in fleet if engine in self._outcomes),
            non_finite=None if non_finite is None else dict(non_finite),
            own_nbytes=own_nbytes,
            held_s=held_s,
            at=timeline.at,
        )

    def _engine(self, engine: EngineLink, digest: str) -> EngineReport:
        took_part = engine in self._outcomes
        outcome = self._outcomes.of(engine) if took_part else EngineProgress(error=self._absent[engine.name])
        return EngineReport(
            name=engine.name,
            kind=engine.client.kind,
            version=engine.version,
            ok=outcome.error is None,
            error=None if outcome.error is None else str(outcome.error),
            # Every worker proved its own part; together that is the published content.
            digest=digest if outcome.committed else None,
            phases=tuple(outcome.phases),
            workers=self._workers(engine) if took_part else (),
        )

    def _workers(self, engine: EngineLink) -> tuple[WorkerReport, ...]:
        reports = []
        for worker in engine.workers:
            progress = self._outcomes.progress(worker)
            codec, codec_reason = worker.codec.as_sent()
            reports.append(
                WorkerReport(
                    rank=worker.member.rank,
                    transport=worker.transport.name if worker.transport is not None else "none",
                    reason=worker.reasons,
                    nbytes=progress.nbytes,
                    seconds=progress.seconds,
                    # What was staged and did not go live is nothing that the engine holds.
                    digest=f"{progress.digest or 0:016x}" if self._outcomes.of(engine).committed else "",
                    shadow=worker.landings.shadow,
                    shadow_nbytes=worker.landings.shadow_nbytes,
                    through_loader=worker.through_loader,
                    codec=codec,
                    codec_reason=codec_reason,
                    sent_nbytes=worker.codec.sent_nbytes,
                    digested=progress.digested,
                )
            )
        return tuple(reports)


def _joined(names: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))
