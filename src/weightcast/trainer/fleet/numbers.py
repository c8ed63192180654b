"""Numbers: which version number comes next in a fleet, and who serves the highest one. A number is never used again."""

from __future__ import annotations

from weightcast.digest.versions import MAX_DIGITS, version_number
from weightcast.errors import StateError
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink


class Numbers:
    """Goes on after ``last``, after what its own rounds used, and after what any engine says on joining that it has seen: also one
    that was taken back, and that this trainer never heard of. What engines say counts as far as it can be believed (see links):
    numbers never go back, and no engine can use them up."""

    def __init__(self, fleet: Fleet, last: int) -> None:
        self._fleet = fleet
        self.use(last)

    def use(self, number: int) -> None:
        """An engine may have served this number."""
        self._fleet.number_used = max(self._fleet.number_used, number)

    def next(self) -> int:
        number = max([self._fleet.number_used, *(engine.highest for engine in self._fleet.engines)]) + 1
        if number >= 10**MAX_DIGITS:
            raise StateError("all version numbers are used up", hint="Restart the engines, and begin another log")
        return number

    def current(self) -> EngineLink | None:
        """An engine that serves the highest version of the fleet, if one was published. One that names a version which nobody can
        have published is none."""
        served = [
            engine
            for engine in self._fleet.engines
            if engine.joined
            and engine.digest
            and not engine.dirty
            and version_number(engine.version) <= max(self._fleet.number_used, engine.highest)
        ]
        return max(served, key=lambda engine: version_number(engine.version), default=None)
