"""Feeding: whether the workers of a chain feed each other in a round, by what earlier rounds have taken. Pure.

Sites that the user named do. "auto" measures: rounds in which the trainer sends to each worker, then rounds in which the workers feed each
other, and stays with what takes less time until all of the chain have everything.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

FAST_BYTES_S = 1.5e9
"""A trainer that sends this much in a second is not worth a chain: each worker's own memory does little more."""
MARGIN = 0.9
"""The other way is taken once it takes less than this share of the time."""
AGAIN = 50
"""After so many rounds the other way is tried again; later where it took several times as long, so that trying costs two in a hundred
of the time at most."""
REMEMBERED = 3
"""Rounds of each way whose median counts: one that was held up decides nothing."""


def _no_times() -> dict[bool, deque[float]]:
    return {way: deque(maxlen=REMEMBERED) for way in (False, True)}


@dataclass(slots=True, eq=False)
class Feeding:
    """One chain of ``count`` workers. Rounds call ``choose`` when they begin and ``note`` when all workers have everything."""

    count: int
    is_measured: bool
    """Whether rounds decide; otherwise the workers always feed each other."""
    is_on: bool = False
    """Whether the workers feed each other in the present round."""
    reason: str = ""
    """Why the present round does what it does; empty where the user has decided."""
    _prefers: bool = False
    _took: dict[bool, deque[float]] = field(default_factory=_no_times)
    """Seconds, without and with feeding."""
    _nbytes: int = 0
    """Bytes that all workers together got in the last round."""
    _begun: set[bool] = field(default_factory=set)
    """Ways that these pairs have taken: in the first round of each, something is made that later ones have."""
    _since: int = 0
    """Rounds since the way that is not preferred was measured."""

    def renew(self) -> None:
        """The pairs are new."""
        self._begun.clear()

    def choose(self) -> None:
        """Choose for the round that begins."""
        self.is_on, self.reason = self._best() if self.is_measured else (True, "")

    def note(self, nbytes: int, seconds: float) -> None:
        """The workers have all of the present round: so many bytes together, the last of them after so many seconds."""
        way, is_first = self.is_on, self.is_on not in self._begun
        self._begun.add(way)
        self._nbytes = nbytes
        if not is_first:
            self._took[way].append(seconds)
        self._since = 0 if way != self._prefers and not is_first else self._since + 1

    def _best(self) -> tuple[bool, str]:
        direct, fed = self._median(False), self._median(True)
        if direct is None:
            return False, "the trainer's way to all engines of the site has not been measured yet"
        rate = self._nbytes / max(direct, 1e-9)
        told = f"the trainer takes {direct:.3g} s for all engines of the site ({rate / 1e9:.3g} GB/s)"
        if rate > FAST_BYTES_S:
            return False, f"{told}, too fast for relays to pay"
        if fed is None:
            return True, f"{told}, relays are tried"
        took = {False: direct, True: fed}
        if took[not self._prefers] < MARGIN * took[self._prefers]:
            self._prefers, self._since = not self._prefers, 0
        told = f"{told}, relays {fed:.3g} s"
        if self._since >= AGAIN * max(1.0, took[not self._prefers] / max(took[self._prefers], 1e-9)):
            return not self._prefers, f"{told}; measured again"
        return self._prefers, told

    def _median(self, way: bool) -> float | None:
        return statistics.median(self._took[way]) if self._took[way] else None
