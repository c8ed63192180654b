"""Report: what one ``publish()`` did, as a record that travels as JSON (one object per line in a RoundLog).

Times are seconds on the publisher's monotonic clock, counted from the start of the ``publish()`` call; ``Report.at`` says when that was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from weightcast.errors import InvalidInput
from weightcast.untrusted.known import known

Outcome = Literal["committed", "aborted"]
Codec = Literal["dense", "delta"]
Digested = Literal["all", "changed"]
MOST_AT = 1e11
"""Seconds since 1970 that a clock may show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of a round ("announce", "transfer", "verify", "commit", ...): when it began and how long it took."""

    name: str
    start_s: float
    seconds: float

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInput("a phase needs a name", field="name")
        if not (self.start_s >= 0 and self.seconds >= 0):
            raise InvalidInput(f"phase {self.name}: negative time {self.start_s}+{self.seconds}", field="seconds")

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """One worker's part of a round: the transport, the reason for it, bytes, seconds, and the digest of the worker's weights.

    ``codec`` is "delta" where what changed since the round before was sent and "dense" where all values were; ``codec_reason`` says why,
    where the publisher had a choice. ``sent_nbytes`` are the bytes that were sent; 0 where the worker read them itself.
    ``digested`` is "all" where all bytes of the weights were read for the digest, and "changed" where those that changed were, before and
    after, and the rest no more than ten rounds ago.
    ``shadow`` names the kind of memory in which the worker keeps its staged copy, and ``shadow_nbytes`` the size of that copy.
    ``through_loader`` names the tensors that the engine's own loader placed while the engine stood still, with ``#`` for each number.
    """

    rank: int
    transport: str
    reason: str
    nbytes: int
    seconds: float
    digest: str
    shadow: str = ""
    shadow_nbytes: int = 0
    through_loader: tuple[str, ...] = ()
    codec: Codec = "dense"
    codec_reason: str = ""
    sent_nbytes: int = 0
    digested: Digested = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "through_loader", tuple(self.through_loader))
        if self.rank < 0 or self.nbytes < 0 or not self.seconds >= 0:
            raise InvalidInput(f"worker {self.rank}: negative rank, bytes or seconds", field="nbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """One engine's part of a round. ``version`` is the version that the engine serves now; ``error`` says why the engine is not ``ok``.

    ``digest`` is the digest of the engine's live weights over all its workers.
    """

    name: str
    kind: str
    version: str
    ok: bool
    error: str | None = None
    digest: str | None = None
    phases: tuple[Phase, ...] = ()
    workers: tuple[WorkerReport, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "workers", tuple(self.workers))
        if self.digest is None and len(self.workers) == 1:
            object.__setattr__(self, "digest", self.workers[0].digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The record of one round. ``nbytes`` is the sum over all workers; ``digest`` is the hex digest of the published weights.

    ``at`` is when ``publish()`` was called, in seconds since 1970 on the clock of the publisher's host; None in logs of former versions.
    ``non_finite`` counts published values that are NaN or infinite, by tensor; None where nobody counted them (``check_finite``).
    ``unused`` lists the published tensors for which an engine has no place and that the user named as unused. These tensors are part
    of the digest. ``own_nbytes`` is the memory of the publishing process that held published values beside the user's own tensors.
    ``held_s``: how long ``publish(wait=False)`` held up the trainer; None for a call that waited.
    """

    version: str
    number: int
    epoch: int
    round: int
    digest: str
    mode: str
    nbytes: int
    total_s: float
    outcome: Outcome
    phases: tuple[Phase, ...] = ()
    engines: tuple[EngineReport, ...] = ()
    unused: tuple[str, ...] = ()
    non_finite: dict[str, int] | None = None
    own_nbytes: int = 0
    held_s: float | None = None
    at: float | None = None

    def __post_init__(self) -> None:
        if self.nbytes < 0 or not self.total_s >= 0:
            raise InvalidInput(f"report of {self.version}: negative bytes or seconds", field="total_s")
        if self.at is not None and not 0 <= self.at <= MOST_AT:
            raise InvalidInput(f"report of {self.version}: {self.at} is no time since 1970", field="at")
        if self.outcome not in ("committed", "aborted"):
            raise InvalidInput(f"outcome is committed or aborted, not {self.outcome!r}", field="outcome")
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "engines", tuple(self.engines))
        object.__setattr__(self, "unused", tuple(self.unused))

    @property
    def rate_gb_s(self) -> float:
        """The bytes of all workers divided by the time of the whole round, in 10^9 bytes per second; 0.0 for a round without time."""
        return self.nbytes / self.total_s / 1e9 if self.total_s else 0.0

    @property
    def ok(self) -> bool:
        """True when the round committed and every engine's own report is ``ok``."""
        return self.outcome == "committed" and all(engine.ok for engine in self.engines)

    @property
    def digests_match(self) -> bool:
        """True when there is an engine and every engine proved the published digest. Tensors in ``unused`` are proven by no engine."""
        return bool(self.engines) and all(engine.digest == self.digest for engine in self.engines)

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, in the order in which the phases began. Repeated phases are added up."""
        seconds: dict[str, float] = {}
        for phase in sorted(self.phases, key=lambda phase: phase.start_s):
            seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds
        return seconds

    def to_json(self) -> str:
        """Return the report as one line of JSON, from which ``from_json`` makes an equal report."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read the form that ``to_json`` writes. InvalidInput names a field that is wrong; unknown fields are ignored."""
        try:
            return msgspec.json.decode(text, type=known(cls))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"not a report: {error}", field="report") from None

    def __str__(self) -> str:
        # A command that only asks brings reports, and does without numpy.
        from weightcast.manifest.names import number_of

        well = sum(engine.ok for engine in self.engines)
        count = sum((self.non_finite or {}).values())
        places = number_of(len(self.non_finite or {}), "tensor")
        bad = f", NaN or infinite: {number_of(count, 'value')} in {places}" if count else ""
        left_out = f", without {number_of(len(self.unused), 'unused tensor')}" if self.unused else ""
        return (
            f"{self.outcome} {self.version} on {well}/{len(self.engines)} engines, {self.mode}: "
            f"{format_bytes(self.nbytes)} in {self.total_s * 1e3:.1f} ms ({self.rate_gb_s:.2f} GB/s){left_out}{bad}"
        )


def format_bytes(nbytes: int) -> str:
    """Bytes for people, in powers of 1000: "2.57 MB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
