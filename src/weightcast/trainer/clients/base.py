"""EngineClient: what a Publisher asks of an engine beside the control channel. No engine is imported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from weightcast.deadline import Deadline, Seconds
from weightcast.errors import AnswerLost as AnswerLost
from weightcast.errors import EngineError
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.untrusted.known import known

PhaseName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOrder:
    """Make round (epoch, round) live as ``version``; ``pause`` is how requests in flight are treated meanwhile."""

    epoch: int
    round: int
    version: str
    pause: str = "keep"
    clear_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReply:
    """What the engine measured, in seconds by phase ("pause", "apply", "resume"). EngineError when these are no durations."""

    phases: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            phases = msgspec.convert(self.phases, known(dict[PhaseName, Seconds]))
        except msgspec.ValidationError as error:
            raise EngineError(f"the engine's answer to the commit makes no sense: {quoted(str(error))}") from None
        object.__setattr__(self, "phases", {quoted(name, NAME_CHARACTERS): seconds for name, seconds in phases.items()})


class EngineClient(ABC):
    """One engine. Every call ends by its deadline; an error of the engine comes back as the named weightcast error.

    Nothing is retried blindly: a call that may have had an effect (AnswerLost) is repeated only by the round that fences it.
    """

    name: str
    kind: str
    host: str
    """Where the engine is, as this process sees it; the trainer's address is chosen by it."""
    target: object = None
    """The engine's object in this process, or a handle of it: clients with equal ones reach one engine."""

    @abstractmethod
    def world_size(self, deadline: Deadline) -> int:
        """How many workers will join."""

    @abstractmethod
    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        """Have all workers join; returns when they did."""

    @abstractmethod
    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        """Make a round live between two steps; harmless when it is live already."""

    @abstractmethod
    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        """Return to the version before this round if it is live, and see to it that it never will be if it is not."""

    @abstractmethod
    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        """At least ``weight_version``, ``digest`` (str or None), ``dirty``, ``ready``."""

    def close(self) -> None:
        """Free the client; the engine is not touched."""
        return
