"""Presence: brings absent engines into the fleet before a round, and says who is missing."""

from __future__ import annotations

from collections.abc import Sequence

from weightcast.deadline import LEAST_S, Deadline
from weightcast.errors import RoundFailed, StateError, WeightcastError, hint_of
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import UNKNOWN, EngineLink
from weightcast.trainer.fleet.rejoin import Rejoiner
from weightcast.trainer.fleet.set_up import set_up
from weightcast.trainer.settings import Settings

AGAIN_HINT = "Call publish() again"

REJOIN_PATIENCE_S = 2.0
"""How long a round waits for absent engines where it can go on without them."""
SETUP_SHARE = 0.4
"""Share of the time left that connecting may take where an engine that does not answer is left behind."""


class Presence:
    """Who of a fleet is there. Not thread-safe: one caller.

    With require="all" one absent engine is a reason to stop; with "live" the others go on without it, and attempts to have it
    back run beside their rounds, each for a whole ``timeout_s``.
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet, self._require, self._timeout_s = fleet, settings.require, settings.timeout_s
        self._rejoiner = Rejoiner(fleet.admit)

    def forget(self, engine: EngineLink) -> None:
        """End what runs to have an engine back."""
        self._rejoiner.cancel(engine)

    def close(self) -> None:
        """End all attempts; idempotent."""
        self._rejoiner.close()

    def is_too_little(self, failures: dict[str, WeightcastError]) -> bool:
        """Whether the fleet cannot go on without those who failed."""
        return bool(failures) and (self._require == "all" or len(failures) == len(self._fleet.engines))

    def patience(self, deadline: Deadline) -> Deadline | None:
        """How long a round waits for absent engines; None: as long as it takes."""
        if self._require == "all" or not any(engine.joined for engine in self._fleet.engines):
            return None
        return deadline.part(0.25, at_most_s=REJOIN_PATIENCE_S)

    def bring_up(
        self, engines: Sequence[EngineLink], deadline: Deadline, patience: Deadline | None = None
    ) -> dict[str, WeightcastError]:
        """Admit and set up whatever is not connected; errors by name of those that are not ready.

        Who died since the last round is noticed first, so that whoever took its place takes part in this one. With ``patience`` the others go on without those who are slow.
        """
        for engine in engines:
            engine.client.check_caller()
        self._fleet.probe(engines)
        failures = self._connect(engines, deadline, patience)
        if any(engine.name in failures and engine.joined and engine.lost() for engine in engines):
            # Its death was noticed only now; whoever took its place may be there already.
            failures = self._connect(engines, deadline, patience)
        if failures and self._require == "all":
            return failures  # the others were not tried to the end, which is no fault of theirs
        for engine in engines:
            if engine.name in failures:
                continue
            if not engine.joined or engine.broken is not None:
                failures[engine.name] = StateError(
                    f"not connected: {engine.broken}", phase="join", engine=engine.name, hint=AGAIN_HINT
                )
            elif engine.version == UNKNOWN:
                self._ask(engine, deadline, failures)
        return failures

    def _connect(
        self, engines: Sequence[EngineLink], deadline: Deadline, patience: Deadline | None
    ) -> dict[str, WeightcastError]:
        for engine in engines:
            if engine.joined and engine.lost():
                engine.joined, engine.broken = False, engine.lost()
        absent = [engine for engine in engines if not engine.joined]
        failures = self._rejoiner.attempt(absent, self._joining(deadline, patience), patience) if absent else {}
        if failures and self._require == "all":
            return failures
        while True:
            self._fleet.regroup([engine for engine in engines if engine.name not in failures])
            # More than once: a transport that comes in new may move the source's memory, and then others connect again.
            broken = [e for e in engines if e.joined and e.broken is not None and e.name not in failures]
            if not broken:
                return failures
            share = 1.0 if self._require == "all" else SETUP_SHARE
            failures |= set_up(self._fleet, broken, deadline.part(share))

    def _joining(self, deadline: Deadline, patience: Deadline | None) -> Deadline:
        """How long engines may take to join: beside rounds a whole timeout, before them what leaves time for the rest."""
        if patience is not None:
            return Deadline(self._timeout_s)
        if self._require == "all":
            return deadline.part()
        wait_s = self._fleet.wait_s
        return deadline.part(at_most_s=wait_s + (1.0 - SETUP_SHARE) * max(deadline.remaining_s() - wait_s, LEAST_S))

    @staticmethod
    def _ask(engine: EngineLink, deadline: Deadline, failures: dict[str, WeightcastError]) -> None:
        """Learn what an engine serves whose last commit or roll-back could not be followed."""
        try:
            engine.learn(engine.client.status(deadline.part(0.25)))
        except WeightcastError as error:
            failures[engine.name] = error.at(engine=engine.name, phase="join")


def join_error(failures: dict[str, WeightcastError]) -> WeightcastError:
    """What to raise when engines could not be connected: the error of the one, or of all by name."""
    if len(failures) == 1:
        return next(iter(failures.values()))
    return RoundFailed(
        "engines could not be connected", phase="join", causes=failures, hint=hint_of(failures, AGAIN_HINT)
    )


def not_connected(fleet: Fleet, number: int, failures: dict[str, WeightcastError]) -> RoundFailed:
    """What to raise when a version was not published because engines are not there."""
    return RoundFailed(
        f"version {number} was not published: {len(failures)} of {len(fleet.engines)} engines are not connected",
        phase="join",
        causes=failures,
        serving={engine.name: engine.version for engine in fleet.engines if not engine.dirty},
        dirty=tuple(engine.name for engine in fleet.engines if engine.dirty),
        hint=f"{hint_of(failures, f'{AGAIN_HINT} when they are back')}, or remove() these engines",
    )
