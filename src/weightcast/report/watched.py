"""Watched: what a server says of its engines and their rounds, checked before the live page shows it. Pure.

A server that is watched may say anything. What does not fit these records counts as no answer; texts are cut and cleaned, and the
page, whose script draws every engine in one go, never meets a value of another kind.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from weightcast.deadline import Seconds
from weightcast.quoted import NAME_CHARACTERS, quote_fields, quoted
from weightcast.report.model import MOST_AT
from weightcast.untrusted.known import known

MAX_ENGINES = 64
MAX_ROUNDS = 200
MAX_PHASES = 32
MAX_ADAPTERS = 64

Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class WatchedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves under the name of an adapter."""

    weight_version: str

    def __post_init__(self) -> None:
        quote_fields(self)


class WatchedStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine serves, as far as the page shows it."""

    weight_version: str
    ready: bool
    reason: str = ""
    dirty: bool = False
    paused: bool = False
    adapters: dict[str, WatchedAdapter] = {}

    def __post_init__(self) -> None:
        quote_fields(self)
        first = list(self.adapters.items())[:MAX_ADAPTERS]
        named = {quoted(name, NAME_CHARACTERS): adapter for name, adapter in first}
        msgspec.structs.force_setattr(self, "adapters", named)


class WatchedPhase(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of an order: when it began and how long it took."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    start_s: Seconds
    seconds: Seconds

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "name", quoted(self.name, 64))


class WatchedRound(msgspec.Struct, frozen=True, kw_only=True):
    """One order that an engine carried out."""

    action: str
    epoch: Number
    round: Number
    version: str
    seconds: Seconds
    phases: tuple[WatchedPhase, ...] = ()
    at: Annotated[float, msgspec.Meta(ge=0, le=MOST_AT)] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        quote_fields(self)
        msgspec.structs.force_setattr(self, "phases", self.phases[:MAX_PHASES])


class WatchedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: its status, None where it gave none, and its latest rounds."""

    name: str = ""
    status: WatchedStatus | None = None
    rounds: tuple[WatchedRound, ...] = ()

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "name", quoted(self.name, NAME_CHARACTERS))
        msgspec.structs.force_setattr(self, "rounds", self.rounds[-MAX_ROUNDS:])


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    engines: Annotated[tuple[WatchedEngine, ...], msgspec.Meta(min_length=1, max_length=MAX_ENGINES)]


def watched_engines(content: bytes) -> tuple[WatchedEngine, ...]:
    """The engines in the answer of ``/weightcast/rounds``; msgspec.DecodeError for anything else."""
    try:
        return msgspec.json.decode(content, type=known(_Answer)).engines
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
