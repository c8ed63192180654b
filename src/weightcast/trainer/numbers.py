"""Numbers: which version number comes next in a fleet, and who serves the highest one. A number is never used again."""

from __future__ import annotations

from weightcast.digest import version_number
from weightcast.trainer.fleet import Fleet
from weightcast.trainer.links import EngineLink


class Numbers:
    """Goes on after ``last``, after what its own rounds used, and after what any engine says that it has seen: also one that
    was taken back, and that this trainer never heard of."""

    def __init__(self, fleet: Fleet, last: int) -> None:
        self._fleet, self._last = fleet, last

    def use(self, number: int) -> None:
        """An engine may have served this number."""
        self._last = max(self._last, number)

    def next(self) -> int:
        heard = [max(engine.highest, version_number(engine.version)) for engine in self._fleet.engines]
        return max([self._last, *heard]) + 1

    def current(self) -> EngineLink | None:
        """An engine that serves the highest version of the fleet, if one was published."""
        served = [engine for engine in self._fleet.engines if engine.joined and engine.digest and not engine.dirty]
        return max(served, key=lambda engine: version_number(engine.version), default=None)
