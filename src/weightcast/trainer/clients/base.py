"""EngineClient: what a Publisher asks of an engine beside the control channel. No engine is imported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from weightcast.deadline import Deadline, Seconds
from weightcast.errors import (
    MERGED_HINT,
    EngineError,
    Unsupported,
)
from weightcast.errors import (
    AnswerLost as AnswerLost,
)
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.untrusted.known import known

if TYPE_CHECKING:
    from weightcast.trainer.clients.fan_out import Call

CANNOT_SLEEP_HINT = "Publish without wake=, or to engines that sleep only: vLLM with --enable-sleep-mode, SGLang with --enable-memory-saver"

PhaseName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOrder:
    """The order to make the round (epoch, round) live as ``version``. ``pause`` is the treatment of requests in flight."""

    epoch: int
    round: int
    version: str
    pause: str = "keep"
    clear_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReply:
    """The engine's answer to a commit: the seconds of each phase ("pause", "apply", "resume"). EngineError when these are no durations."""

    phases: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            phases = msgspec.convert(self.phases, known(dict[PhaseName, Seconds]))
        except msgspec.ValidationError as error:
            raise EngineError(f"the engine's answer to the commit makes no sense: {quoted(str(error))}") from None
        object.__setattr__(self, "phases", {quoted(name, NAME_CHARACTERS): seconds for name, seconds in phases.items()})


class EngineClient(ABC):
    """The way to call one engine. Every call ends by its deadline, and an error of the engine is raised as the same class here.

    A client repeats no call by itself. A call that may have had an effect (AnswerLost) is repeated by the round, whose number makes the
    repetition harmless.
    """

    name: str
    kind: str
    host: str
    """The host of the engine, as this process names it; the trainer chooses the address that workers dial by this host."""
    adapter: str = ""
    """The LoRA adapter that this client's calls are about; empty for the model itself."""
    target: object = None
    """The engine's object in this process, or a handle of that object. Two clients with equal targets reach one engine."""

    def for_adapter(self, name: str) -> None:
        """Have all further calls be about an adapter of the engine, before the first of them. Unsupported where the engine has none."""
        raise Unsupported(
            f"an engine of kind {self.kind} takes whole weights, and no adapters", engine=self.name, hint=MERGED_HINT
        )

    def wait_until_there(self, deadline: Deadline) -> None:
        """Return once the engine can be asked to join; DeadlineExceeded says what there is instead. An object is there from the start."""
        return

    def check_caller(self) -> None:
        """Raise StateError when a call from the current thread would wait for itself, because the engine needs that thread to answer."""
        return

    @abstractmethod
    def world_size(self, deadline: Deadline) -> int:
        """Return the number of workers that will join."""

    @abstractmethod
    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        """Have all workers join the trainer that ``init_info`` describes; return when all have joined."""

    @abstractmethod
    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        """Make a round live between two steps of the engine. The same order again changes nothing."""

    @property
    def commits_by_call(self) -> bool:
        """Whether a commit is one HTTP call, which is made beside those of other engines (see fan_out). Elsewhere ``commit`` is called, on
        a thread for each engine."""
        return False

    def commit_call(self, order: CommitOrder, deadline: Deadline) -> Call:
        """The call that ``commit`` makes, where ``commits_by_call``."""
        raise Unsupported(f"a commit of an engine of kind {self.kind} is no HTTP call", engine=self.name)

    def commit_reply(self, call: Call) -> CommitReply:
        """What the engine answered to a ``commit_call`` that has ended; raises what ``commit`` would."""
        raise Unsupported(f"a commit of an engine of kind {self.kind} is no HTTP call", engine=self.name)

    @abstractmethod
    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        """Return to the version before this round if the round is live; if not, make sure that the round never goes live."""

    @abstractmethod
    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        """Return the engine's status: at least ``weight_version``, ``digest`` (str or None), ``dirty`` and ``ready``."""

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        """Wake up what sleeps of the memory with these tags of vLLM's, or of all where none are given; what sleeps on.

        An engine goes on computing when nothing sleeps any more. Unsupported where the engine cannot sleep.
        """
        raise Unsupported(f"an engine of kind {self.kind} cannot sleep", engine=self.name, hint=CANNOT_SLEEP_HINT)

    def shutdown(self, deadline: Deadline) -> None:
        """Have the engine leave the trainer, with all that it holds of the trainer's memory; asked of engines that can sleep."""
        raise Unsupported(f"an engine of kind {self.kind} cannot sleep", engine=self.name, hint=CANNOT_SLEEP_HINT)

    def close(self) -> None:
        """Free the client. The engine is not touched."""
        return
