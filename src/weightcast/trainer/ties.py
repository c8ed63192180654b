"""Ties: published tensors that an engine keeps as one, and whether their values are equal now."""

from __future__ import annotations

from functools import partial

from weightcast.deadline import Deadline
from weightcast.memory import Memory
from weightcast.trainer.links import EngineLink
from weightcast.trainer.places import Tie
from weightcast.trainer.proof import ExpectedDigest, plan_key
from weightcast.trainer.ranks import Ranks
from weightcast.trainer.ranks.leader import SharedDigest

Digests = tuple[ExpectedDigest | SharedDigest, ExpectedDigest | SharedDigest]


class Ties:
    """Compares tied tensors by digests that are taken where the values lie. Used by one call at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._digests: dict[Tie, Digests] = {}

    def doubtful(self, engine: EngineLink) -> list[Tie]:
        """Tensors that the engine keeps as one and that are not one memory here, either: only their values can tell."""
        return [tie for tie in engine.places.ties if not tie.is_one_memory(self._ranks.holdings)]

    def digests(self, tie: Tie, deadline: Deadline) -> Digests:
        """The digests of both tensors, equal exactly when their values are."""
        if tie not in self._digests:
            first, second = (self._expected(tie, name, deadline) for name in tie.names)
            self._digests[tie] = first, second
        return self._digests[tie]

    def _expected(self, tie: Tie, name: str, deadline: Deadline) -> ExpectedDigest | SharedDigest:
        plan = tie.copies(name, self._ranks.manifest, self._ranks.holdings)
        return self._ranks.expected(f"{plan_key(plan)} of {tie.shape}", plan, deadline, tie.manifest())

    def check(self, engine: EngineLink, memory: Memory, deadline: Deadline) -> None:
        """Raise PlanMismatch where tensors that the engine keeps as one have different values in the source's memory."""
        check = partial(deadline.check, "comparing tied tensors")
        for tie in self.doubtful(engine):
            first, second = self.digests(tie, deadline)
            if first.of(memory, check) != second.of(memory, check):
                raise tie.unequal()

    def forget(self) -> None:
        """The source's memory moved, or is not needed any more."""
        self._digests.clear()
