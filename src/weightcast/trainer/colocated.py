"""Colocated: a round for a trainer that shares its GPUs with engines which sleep between rounds.

    weights    of all engines wake up
    round      as any other
    leave      engines give up shadows, staging areas and mappings of the trainer's memory
    release    each rank frees what it wants to, and all ranks have before anything goes on
    rest       keys and values wake up, in engines that serve the new version only

Load-bearing: vLLM lets an engine compute when nothing of it sleeps any more, so one without the new version is not woken up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from weightcast.deadline import Deadline
from weightcast.errors import RoundFailed, WakeFailed, WeightcastError, said_of_sleep
from weightcast.report.model import Report
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.fleet.waking import Waking, shut_down
from weightcast.trainer.ranks import Ranks

Release = Callable[[], object]


class Colocated:
    """``publish(wake=True)`` on rank 0. ``has_let_go``: sources are to be looked at anew before the next round."""

    def __init__(self, fleet: Fleet, ranks: Ranks) -> None:
        self._fleet, self._ranks = fleet, ranks
        self.has_let_go = False

    def publish(self, round: Callable[[Waking], Report], release: Release | None, deadline: Deadline) -> Report:
        """``round`` wakes weights up and publishes; the rest of the order is here. Raises what it raises, or WakeFailed."""
        waking = Waking()
        try:
            report = round(waking)
        except RoundFailed as failure:
            failure.asleep = dict(waking.asleep)
            raise
        except WeightcastError as error:
            for said in said_of_sleep(waking.asleep):
                error.add_note(said)
            raise
        engines = [e for e in self._fleet.engines if not e.dirty and e.version == report.version]
        if release is None and self._ranks.alone and not any(waking.asleep.get(e.name) for e in engines):
            return report
        self._part(engines, report, waking, deadline)
        self._let_go(release, report, waking, deadline)
        _raise_first(waking.rest(engines, deadline), "an engine did not wake up", report, waking)
        return report

    def _part(self, engines: Sequence[EngineLink], report: Report, waking: Waking, deadline: Deadline) -> None:
        """Have all engines leave. Those without the new version are told to, and not waited for beyond their answer."""
        joined = [engine for engine in self._fleet.engines if engine.joined]
        errors = shut_down(joined, deadline)
        for engine in joined:
            self._fleet.has_left(engine)
        errors = {engine.name: errors[engine.name] for engine in engines if engine.name in errors}
        _raise_first(errors, "an engine did not let go of the trainer's memory", report, waking)

    def _let_go(self, release: Release | None, report: Report, waking: Waking, deadline: Deadline) -> None:
        def own() -> None:
            if release is not None:
                self._fleet.let_go()
                release()

        self.has_let_go = True
        try:
            self._ranks.let_go(own, deadline)
        except Exception as error:
            what = str(error) if isinstance(error, WeightcastError) else f"{type(error).__name__}: {error}"
            raise _failed(f"release() raised {what}", report, waking) from error


def _raise_first(errors: Mapping[str, WeightcastError], what: str, report: Report, waking: Waking) -> None:
    for name, error in errors.items():
        raise _failed(f"{what}: {error}", report, waking, engine=name) from error


def _failed(what: str, report: Report, waking: Waking, *, engine: str | None = None) -> WakeFailed:
    sleeping: Sequence[str] = said_of_sleep(waking.asleep)
    return WakeFailed(
        f"version {report.version} is live; {'; '.join(sleeping)}. {what}",
        version=report.version,
        asleep=waking.asleep,
        engine=engine,
    )
