"""What became of a call in every worker of an engine, for engines whose workers must not raise.

In such an engine (vLLM) a call answers with one record per worker. It counts as done only when all of them say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from weightcast.content.live_tensors import LiveTensor
from weightcast.errors import EngineError, ErrorForm, Unsupported, WeightcastError
from weightcast.quoted import quoted
from weightcast.untrusted.known import known

WEIGHTS = "weights"
"""vLLM's tag of the memory that weights lie in."""
KEYS_AND_VALUES = "kv_cache"
"""vLLM's tag of the memory that keys and values lie in. Memory of other tags comes back with either of the two."""
NO_VERSION = "none"
"""What an engine serves whose weights were lost in its sleep."""


class AdapterOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker serves under the name of an adapter."""

    weight_version: str
    digest: str
    dirty: bool
    ids: dict[str, int] = {}
    """The engine's own number of each version that is there, by its label, such as ``policy@3-9f2c…``."""


class WorkerOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's answer: what it serves now, and the error that the call ended with, if it did."""

    rank: int
    weight_version: str
    digest: str
    dirty: bool
    error: ErrorForm | None = None
    apply_s: float = 0.0
    checksums: dict[str, str] = {}
    tensors: dict[str, LiveTensor] = {}
    held: bool = False
    """The engine was paused because of its weights, by weightcast and nobody else; whoever heals it lets it go on."""

    asleep: tuple[str, ...] = ()
    """What the engine's sleep has unmapped in this worker: "weights", "kv_cache", or other tags of vLLM's."""

    is_greeting: bool = False
    """A trainer was greeted, and neither its answer nor the end of the time for one is there."""

    num_syncs: int = 0
    """Updates that this worker made live, whichever process of a server asked for them."""

    ids: dict[str, int] = {}
    """Where the call was about an adapter: as in AdapterOutcome."""

    adapters: dict[str, AdapterOutcome] = {}
    """Where the call was about the model: the adapters beside it, by name."""

    def raised(self) -> WeightcastError | None:
        """The error as it was raised in the worker."""
        return None if self.error is None else self.error.error(worker=self.rank)


def outcomes_from(answers: Sequence[Any]) -> list[WorkerOutcome]:
    """The records in an engine's answer; EngineError when it is something else."""
    try:
        outcomes = msgspec.convert(list(answers), known(list[WorkerOutcome]))
    except msgspec.ValidationError as error:
        raise EngineError(
            f"the engine's workers answered something else: {quoted(str(error))}",
            hint='Start it with --weight-transfer-config \'{"backend": "weightcast"}\'',
        ) from None
    if not outcomes:
        raise EngineError("no worker answered")
    return sorted(outcomes, key=lambda outcome: outcome.rank)


def first_error(outcomes: Sequence[WorkerOutcome]) -> WeightcastError | None:
    """The first worker's error, if any worker has one."""
    return next((error for outcome in outcomes if (error := outcome.raised()) is not None), None)


def require_all(outcomes: Sequence[WorkerOutcome], world_size: int) -> None:
    """Raise Unsupported unless every worker answered: of one that was not asked nobody knows what it serves."""
    if len(outcomes) != world_size:
        raise Unsupported(
            f"{len(outcomes)} of {world_size} workers answered",
            hint="Start each data-parallel replica as a server of its own",
        )


def why_unfit(outcomes: Sequence[WorkerOutcome]) -> str:
    """Why the engine must not compute with what its workers hold; empty when all of them serve one clean version."""
    dirty = [str(outcome.rank) for outcome in outcomes if outcome.dirty]
    lost = [str(outcome.rank) for outcome in outcomes if outcome.dirty and outcome.weight_version == NO_VERSION]
    if lost:
        return f"the weights of worker {', '.join(lost)} were lost in its sleep"
    if dirty:
        return f"the weights of worker {', '.join(dirty)} are of no version: an update failed half-way"
    if len({outcome.weight_version for outcome in outcomes}) > 1:
        return f"the workers do not agree: {_told(outcomes)}"
    return ""


def why_asleep(outcomes: Sequence[WorkerOutcome]) -> str:
    """Why the workers' weights cannot be touched now; empty when they can."""
    asleep = [str(outcome.rank) for outcome in outcomes if WEIGHTS in outcome.asleep]
    return f"the weights of worker {', '.join(asleep)} are not mapped" if asleep else ""


def asleep_tags(outcomes: Sequence[WorkerOutcome]) -> tuple[str, ...]:
    """The tags of all memory that sleeps in any worker, in alphabetical order."""
    return tuple(sorted({tag for outcome in outcomes for tag in outcome.asleep}))


def tags_to_wake(
    outcomes: Sequence[WorkerOutcome], tags: Sequence[str], known: Sequence[str] = (WEIGHTS, KEYS_AND_VALUES)
) -> list[str]:
    """What an engine is told to wake: those of the ``tags`` (all, where none are given) that sleep and that the engine wakes by name,
    ``known``. vLLM 0.26 and 0.27 map memory that is awake once more where they are told to wake it, so nothing else is named."""
    asleep = asleep_tags(outcomes)
    return [tag for tag in known if tag in asleep and (not tags or tag in tags)]


def sleeps(outcomes: Sequence[WorkerOutcome]) -> bool:
    """Whether anything of the engine sleeps: then its scheduler must not go on."""
    return any(outcome.asleep for outcome in outcomes)


def common_version(outcomes: Sequence[WorkerOutcome]) -> str:
    """The version that all workers serve; EngineError names the workers that differ."""
    versions = {outcome.weight_version for outcome in outcomes}
    if len(versions) > 1:
        raise EngineError(f"the workers do not agree: {_told(outcomes)}", hint="Publish again")
    return versions.pop()


def _told(outcomes: Sequence[WorkerOutcome]) -> str:
    return ", ".join(f"worker {outcome.rank} serves {outcome.weight_version}" for outcome in outcomes)
