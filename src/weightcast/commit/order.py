"""What is ordered of an engine, and what the engine says of itself while it carries the order out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from weightcast.commit.worker_outcome import WorkerOutcome, first_error, why_unfit
from weightcast.errors import InvalidInput

CommitPause = Literal["keep", "wait", "abort", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOrder:
    """Commit or roll back one round. ``version`` is empty for a roll-back.

    ``adapter`` is the LoRA adapter that the round is of, and empty for the model. An adapter's round pauses nothing and forgets nothing.
    """

    action: Literal["commit", "rollback"]
    epoch: int
    round: int
    version: str = ""
    pause: CommitPause = "keep"
    clear_cache: bool = True
    timeout_s: float = 60.0
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.adapter:
            object.__setattr__(self, "pause", "none")
            object.__setattr__(self, "clear_cache", False)

    def way_back(self) -> RoundOrder:
        """The order to take the same round back."""
        return RoundOrder(action="rollback", epoch=self.epoch, round=self.round, adapter=self.adapter)

    def same_as(self, other: RoundOrder) -> bool:
        """Whether both orders want the same of the same round."""
        return (self.action, self.epoch, self.round, self.version) == (
            other.action,
            other.epoch,
            other.round,
            other.version,
        )


def commit_pause(text: str) -> CommitPause:
    """``text`` as a way to pause; InvalidInput names what there is."""
    if text not in get_args(CommitPause):
        raise InvalidInput(f"pause is {', '.join(get_args(CommitPause))}, not {text!r}", field="pause")
    return cast(CommitPause, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAnswer:
    """What is live after an order, and how long each phase took."""

    version: str
    phases: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whether an engine computes, before an order is carried out."""

    paused: bool
    held: bool = False
    """The pause is weightcast's: the engine's weights were of no version, or of several."""
    must_pause: bool = False
    """The order needs a pause whatever it says: between two workers' commits no step may come in."""
    pause_forgets: bool = True
    """A pause that is told to clear the cache does so, or raises."""
    in_one_step: bool = False
    """The change comes between two steps in all workers and clears the cache itself where the order says so: mode keep needs no pause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine's workers serve, and what became of the change that they were asked for."""

    version: str | None
    """None where the workers serve several versions."""
    unfit: str = ""
    """Why the engine must not compute with its weights; empty when it may."""
    held: bool = False
    error: Exception | None = None
    partly: bool = False
    """Some workers carried the change out, and others did not."""

    @classmethod
    def of(cls, outcomes: Sequence[WorkerOutcome]) -> Serving:
        """What the outcomes of all workers say together."""
        versions = {outcome.weight_version for outcome in outcomes}
        error = first_error(outcomes)
        return cls(
            version=versions.pop() if len(versions) == 1 else None,
            unfit=why_unfit(outcomes),
            held=any(outcome.held for outcome in outcomes),
            error=error,
            partly=error is not None and any(outcome.raised() is None for outcome in outcomes),
        )
