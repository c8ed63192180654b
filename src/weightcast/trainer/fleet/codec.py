"""Codec: whether one worker's bytes go as all values or as what changed since the round before, by what earlier rounds have taken.

Of True and False the user has decided. "auto" measures: finding changes reads all values twice, so that a fast link is through before
that is done, and nothing is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightcast.report.model import Codec as CodecName
from weightcast.trainer.settings import Delta

FAST_BYTES_S = 1.5e9
"""Links that are faster bring all values before changes of these could be found."""
AGAIN = 50
"""After so many rounds of all values it is tried again whether changes are faster; later where changes took several times as long, so
that trying costs two in a hundred of the time at most."""


@dataclass(slots=True)
class Codec:
    """How the pairs of one worker send, from their set-up on: they begin with nothing that the worker holds."""

    wish: Delta
    refused: str = ""
    """Why changes cannot be sent over these pairs; empty where they can."""
    is_kept: bool = False
    """Whether the trainer keeps what it sends, from the present round on."""
    changes: bool = False
    """Whether the present round sends changes."""
    reason: str = ""
    """Why the present round sends what it does."""
    sent_nbytes: int = 0
    """Bytes that the present round has sent."""
    looked_s: float = 0.0
    """For how long the present round has looked for changes before any byte travelled."""
    _whole_nbytes: int = 0
    """Bytes that the last round of all values sent."""
    _rounds: int = 0
    """Rounds that these pairs have kept."""
    _of_values: tuple[int, float] | None = None
    """Bytes and seconds of the last round of all values."""
    _of_changes: tuple[int, float] | None = None
    _since: int = 0
    """Rounds since ``_of_changes`` was measured."""

    def choose(self) -> None:
        """Choose for the round that begins."""
        self.sent_nbytes, self.looked_s = 0, 0.0
        self.is_kept, self.reason = self._keeps()
        self.changes = self.is_kept and self._rounds > 0
        if self.is_kept and not self.changes:
            self.reason = "the worker holds nothing that changes could be told against"

    def as_sent(self) -> tuple[CodecName, str]:
        """How the present round went, and why: where no bucket's changes were shorter, all values went."""
        if not self.changes:
            return "dense", self.reason
        if self.sent_nbytes >= self._whole_nbytes:
            return "dense", "the changes are no shorter than all values"
        return "delta", self.reason

    def _keeps(self) -> tuple[bool, str]:
        if not self.wish:
            return False, ""
        if self.refused:
            return False, self.refused
        if self.wish is True:
            return True, "delta=True"
        if self._of_values is None:
            return False, "the link has not been measured yet"
        nbytes, seconds = self._of_values
        rate = nbytes / max(seconds, 1e-9)
        told = f"all values take {seconds:.3g} s ({rate / 1e9:.3g} GB/s)"
        if rate > FAST_BYTES_S:
            return False, f"{told}, as fast as changes are found"
        if self._of_changes is None:
            return True, told
        changed, took = self._of_changes
        if self._since >= AGAIN * max(1.0, took / max(seconds, 1e-9)):
            return True, told
        return took < seconds, f"{told}, changes {took:.3g} s ({changed} bytes)"

    def note(self, nbytes: int, seconds: float) -> None:
        """The worker has all of the present round: so many bytes landed, and that took so long."""
        if self.changes:
            self._of_changes, self._since = (self.sent_nbytes, seconds + self.looked_s), 0
        else:
            self._whole_nbytes = self.sent_nbytes
            if not self.is_kept:  # a round that keeps what it sends takes longer than one that need not
                self._of_values = nbytes, seconds
            self._since += 1
        self._rounds = self._rounds + 1 if self.is_kept else 0
