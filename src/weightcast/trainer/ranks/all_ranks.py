"""Ranks: what rank 0 of a trainer knows of the other ranks, and how it orders them about.

A collective call is entered by every rank, each on its own; rank 0 then orders, and ends the call on all of them with its own
outcome. The null case, a trainer of one rank, costs nothing.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from weightcast.content.expected import ExpectedDigest, expected_digest
from weightcast.control.coordinator import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import ProtocolError, WeightcastError
from weightcast.facts import Facts
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest
from weightcast.messages import Offer
from weightcast.plan import AnyLayout, CopyColumns, Holdings, Plan
from weightcast.report.model import Report
from weightcast.sources.base import Source
from weightcast.sources.gathered import OTHERS_DIFFER
from weightcast.sources.holder import Holder
from weightcast.trainer.ranks.coverage import check_complete, joined_manifest
from weightcast.trainer.ranks.line import Line
from weightcast.trainer.ranks.orders import (
    Adopt,
    Agree,
    Enter,
    Exhaust,
    Expect,
    Finish,
    Keep,
    LetGo,
    Pair,
    Refresh,
    Release,
    Renew,
    Survey,
)
from weightcast.trainer.ranks.shared_digest import SharedDigest
from weightcast.transports.facts import local_facts

logger = logging.getLogger(__name__)

RANK_0 = 0

T = TypeVar("T")


class Ranks:
    """The other ranks of the trainer, by rank. Calls end by their deadline; thread-safe but for ``collectively``."""

    def __init__(self, holder: Holder, coordinator: Coordinator, size: int = 1) -> None:
        self._holder = holder
        self.alone = size == 1
        """Whether this rank is the only one."""
        self.line = Line(coordinator, size)
        self.manifest = holder.source.manifest
        """What all ranks together publish, once they have met in a call."""
        self.deadline = Deadline(1.0)
        """That of the call that runs."""
        self._layouts: dict[int, LayoutTable] = {}
        """What the other ranks hold."""
        self._facts: dict[int, Facts] = {}
        """What the other ranks say of their processes, and of where their weights lie."""
        self._holdings: tuple[list[object], Holdings] | None = None
        self._pairs = itertools.count(1)

    @property
    def _source(self) -> Source:
        return self._holder.source

    # -- collective calls

    def collectively(self, what: str, deadline: Deadline, work: Callable[[], T]) -> T:
        """Do ``work`` as the leader's part of a call that all ranks make; they return its Report or raise its error."""
        if self.alone:
            return work()
        self.deadline = deadline
        try:
            self._enter(what, deadline)
            result = work()
        except BaseException as error:
            self.line.tell_whoever_is_there(Finish.failed(error))
            raise
        report = result.to_json() if isinstance(result, Report) else ""
        self.line.tell_whoever_is_there(Finish(report=report))
        return result

    def _enter(self, what: str, deadline: Deadline) -> None:
        self.line.next_call()
        is_new = self.line.meet(deadline)
        self.line.ask_all(Enter(what=what, timeout_s=deadline.limit_s()), deadline, phase="join")
        if is_new or not self._layouts:
            self._survey(deadline)

    def _survey(self, deadline: Deadline) -> None:
        """Learn what every rank holds; together that has to be all of every tensor."""
        answers = self.line.ask_all(Survey(), deadline, phase="join")
        layouts, manifests, facts = {}, {}, {}
        for rank, answer in answers.items():
            assert answer.layout is not None
            assert answer.manifest is not None
            answer.layout.check(answer.manifest)
            assert answer.facts is not None
            layouts[rank], manifests[rank], facts[rank] = answer.layout, answer.manifest, answer.facts
        manifest = joined_manifest({RANK_0: self._source.manifest, **manifests})
        layouts = {rank: layout.of_manifest(manifests[rank], manifest) for rank, layout in layouts.items()}
        check_complete(Holdings.of(manifest, {RANK_0: self._source.layout, **layouts}))
        self.line.ask_all(Agree(manifest=manifest), deadline, phase="join")
        self.manifest, self._layouts, self._facts = manifest, layouts, facts

    def renew(self, deadline: Deadline) -> bool:
        """Have all ranks, this one too, look at their sources anew; True when one of them made another one.

        When a rank cannot, its error is raised, and what the others hold is learnt in the next call.
        """
        posted = self.line.post_all(Renew())
        known, self._layouts = self._layouts, {}
        renewed = self._holder.renew()
        answers = self.line.hear_all(posted, deadline, phase="join")
        if any(answer.moved for answer in answers.values()) or (renewed and posted):
            self._survey(deadline)
            return True
        self._layouts = known
        if renewed:
            self.manifest = self._source.manifest
            check_complete(Holdings.of(self.manifest, {RANK_0: self._source.layout}))
        return renewed

    # -- what ranks hold

    @property
    def holdings(self) -> Holdings:
        """Of all ranks; the same object until one of them holds something else."""
        parts: list[object] = [self.manifest, self._source.layout, *self._layouts.values()]
        if self._holdings is None or not _are_same(self._holdings[0], parts):
            layouts: dict[int, AnyLayout] = {RANK_0: self._source.layout, **self._layouts}
            self._holdings = parts, Holdings.of(self.manifest, layouts)
        return self._holdings[1]

    def facts(self) -> list[Facts]:
        """Of all ranks that give something, for choosing a transport that each of them can use."""
        own = local_facts(self._source.device, files=self._source.memory.files)
        return [own] if self._source.layout.is_streamed else [own, *self._facts.values()]

    def adopt(self, transports: Sequence[str], deadline: Deadline) -> bool:
        """Have all other ranks make their memory reachable; whether one of them moved it."""
        if self.alone or not transports:
            return False
        answers = self.line.ask_all(Adopt(transports=tuple(sorted(transports))), deadline, phase="setup")
        for rank, answer in answers.items():
            assert answer.layout is not None
            self._layouts[rank] = answer.layout
        return any(answer.moved for answer in answers.values())

    def let_go(self, own: Callable[[], None], deadline: Deadline, *, always: bool = False) -> None:
        """Have all ranks release memory, this one by ``own``; returns, or raises the first error, when all have done so."""
        posted = self.line.post_all(LetGo(always=always))
        errors: list[Exception] = []
        try:
            own()
        except Exception as error:  # noqa: BLE001 - the others are waited for in any case
            errors.append(error)
        for rank, number in posted.items():
            try:
                self.line.hear(rank, number, deadline, phase="release")
            except WeightcastError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def refresh(self, deadline: Deadline) -> None:
        """Have all ranks, this one too, hold the values to publish now."""
        order = Refresh(timeout_s=deadline.limit_s())
        posted = self.line.post_all(order)
        failure: WeightcastError | None = None
        try:
            self._source.deadline = deadline
            self._source.refresh()
        except WeightcastError as error:
            failure = error
        for rank, number in posted.items():
            try:
                self.line.hear(rank, number, deadline, phase="gather")
            except WeightcastError as error:
                # What keeps a rank from going on is told rather than that others could not go on without it.
                if failure is None or failure.message == OTHERS_DIFFER:
                    failure = error
        if failure is not None:
            raise failure

    def exhaust(self) -> Callable[[Deadline], None]:
        """Have all other ranks read their streams to the end, beside this one; the call that is returned waits for them."""
        posted = self.line.post_all(Exhaust())

        def wait(deadline: Deadline) -> None:
            self.line.hear_all(posted, deadline, phase="transfer")

        return wait

    def expected(
        self, key: str, plan: Plan, deadline: Deadline, manifest: Manifest | None = None
    ) -> ExpectedDigest | SharedDigest:
        """The digest of a plan's values, each rank's part computed where it lies; at the positions of ``manifest``, or of what is
        published."""
        source = self._source
        windows = source.layout if source.layout.is_streamed else None
        own = expected_digest(manifest or self.manifest, plan.get(RANK_0, ()), source.memory, windows)
        others = [rank for rank in plan if rank != RANK_0]
        if not others:
            return own
        posted = {
            rank: self.line.post(
                rank, Expect(key=key, copies=CopyColumns.of(plan[rank], manifest or self.manifest), manifest=manifest)
            )
            for rank in others
        }
        self.line.hear_all(posted, deadline, phase="setup")
        return SharedDigest(self.line, key, own, others, lambda: self.deadline)

    def keep_expected(self, keys: Iterable[str]) -> None:
        """Have the other ranks expect nothing any more but what has these keys; nobody waits for that."""
        self.line.post_all(Keep(keys=tuple(sorted(keys))))

    def pair(
        self,
        transport: str,
        plan: Plan,
        count: int,
        bucket_nbytes: int,
        deadline: Deadline,
        *,
        keeps: bool = False,
        patience_s: float = 0.0,
    ) -> list[tuple[dict[int, int], list[Offer]]]:
        """Have the other ranks make their ends of the pairs with a group of ``count`` workers that want what the plan says; for
        each worker the pair numbers by rank, and the offers. ``keeps``: they keep what they send. ``patience_s``: the workers feed each other (see ``Transport.ends_of``)."""
        made: list[tuple[dict[int, int], list[Offer]]] = [({}, []) for _ in range(count)]
        posted: dict[int, int] = {}
        for rank in plan:
            if rank != RANK_0:
                for numbers, _ in made:
                    numbers[rank] = next(self._pairs)
                order = Pair(
                    pairs=tuple(numbers[rank] for numbers, _ in made),
                    transport=transport,
                    copies=CopyColumns.of(plan[rank], self.manifest),
                    bucket_nbytes=bucket_nbytes,
                    keeps=plan.key if keeps else "",
                    patience_s=patience_s,
                )
                posted[rank] = self.line.post(rank, order)
        try:
            for rank, number in posted.items():
                answer = self.line.hear(rank, number, deadline, phase="setup")
                if len(answer.offers) != count:
                    raise ProtocolError(f"trainer rank {rank} made {len(answer.offers)} offers for {count} pairs")
                for (_, offers), data in zip(made, answer.offers, strict=True):
                    offers.append(Offer(rank=rank, transport=transport, data=data))
        except BaseException:
            for numbers, _ in made:
                for rank, pair in numbers.items():
                    self.line.post(rank, Release(pair=pair))
            raise
        return made


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
