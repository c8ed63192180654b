"""Ties: published tensors that an engine keeps as one, and whether their values are equal now."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from weightcast.content.expected import ExpectedDigest
from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Holdings, Plan
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.fleet.places import Tie
from weightcast.trainer.ranks import Ranks
from weightcast.trainer.ranks.shared_digest import SharedDigest

Digests = tuple[ExpectedDigest | SharedDigest, ExpectedDigest | SharedDigest]


class Ties:
    """Compares tied tensors by digests that are taken where the values lie. Used by one call at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._digests: dict[Tie, Digests] = {}
        self._seen: Holdings | None = None
        self._is_one: dict[Tie, bool] = {}
        """Whether both tensors were one memory in the holdings that were seen last: a round does not look through them again."""

    def doubtful(self, engine: EngineLink) -> list[Tie]:
        """Tensors that the engine keeps as one and that are not one memory here, either: only their values can tell."""
        if not engine.places.ties:
            return []
        holdings = self._ranks.holdings
        if holdings is not self._seen:
            self._seen, self._is_one = holdings, {}
        for tie in engine.places.ties:
            if tie not in self._is_one:
                self._is_one[tie] = tie.is_one_memory(holdings)
        return [tie for tie in engine.places.ties if not self._is_one[tie]]

    def digests(self, tie: Tie, deadline: Deadline) -> Digests:
        """The digests of both tensors, equal exactly when their values are."""
        if tie not in self._digests:
            first, second = (self._expected(tie, name, deadline) for name in tie.names)
            self._digests[tie] = first, second
        return self._digests[tie]

    def _expected(self, tie: Tie, name: str, deadline: Deadline) -> ExpectedDigest | SharedDigest:
        plan = self._plan(tie, name)
        return self._ranks.expected(self._key(tie, name), plan, deadline, tie.manifest())

    def _plan(self, tie: Tie, name: str) -> Plan:
        return tie.plan(name, self._ranks.holdings)

    def _key(self, tie: Tie, name: str) -> str:
        return f"{self._plan(tie, name).key} of {tie.shape}"

    def check(self, engine: EngineLink, memory: Memory, deadline: Deadline) -> None:
        """Raise PlanMismatch where tensors that the engine keeps as one have different values in the source's memory."""
        check = partial(deadline.check, "comparing tied tensors")
        for tie in self.doubtful(engine):
            first, second = self.digests(tie, deadline)
            if first.of(memory, check) != second.of(memory, check):
                raise tie.unequal()

    def keep(self, ties: Collection[Tie]) -> set[str]:
        """Forget the digests of all ties but these; returns the keys of what is left."""
        self._digests = {tie: digests for tie, digests in self._digests.items() if tie in ties}
        return {self._key(tie, name) for tie in self._digests for name in tie.names}

    def forget(self) -> None:
        """The source's memory moved, or is not needed any more."""
        self._digests.clear()
