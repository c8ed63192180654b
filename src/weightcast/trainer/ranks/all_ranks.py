"""Ranks: what rank 0 of a trainer knows of the other ranks, and how it orders them about.

A collective call is entered by every rank, each on its own; rank 0 then orders, and ends the call on all of them with its own
outcome. The null case, a trainer of one rank, costs nothing.
"""

from __future__ import annotations

import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from weightcast.content.expected import ExpectedDigest, expected_digest
from weightcast.content.finite import added
from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.digest.formula import combine
from weightcast.errors import DeadlineExceeded, PeerLost, PlanMismatch, ProtocolError, WeightcastError
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Failed, Offer, RankAnswer, RankOrder
from weightcast.plan import AnyLayout, CopyColumns, Holdings, Plan
from weightcast.report.model import Report
from weightcast.sources.base import Source
from weightcast.sources.gathered import OTHERS_DIFFER
from weightcast.sources.holder import Holder
from weightcast.trainer.ranks.coverage import check_complete
from weightcast.trainer.ranks.orders import (
    Adopt,
    Agree,
    Answer,
    CountNonFinite,
    Digest,
    Enter,
    Exhaust,
    Expect,
    Finish,
    Keep,
    LetGo,
    Order,
    Pair,
    Refresh,
    Release,
    Renew,
    Survey,
    decode_answer,
    encode,
)
from weightcast.transports.facts import local_facts

logger = logging.getLogger(__name__)

RANKS = "trainer ranks"
"""The name under which trainer ranks join the control channel."""
RANK_0 = 0
LOST_HINT = "Start that rank again, then make a new Publisher on every rank; engines go on with what they serve"
LATE_HINT = "Every rank has to call connect() and publish(), in the same order"

T = TypeVar("T")


class Abortable(Protocol):
    """A pair that several ranks have a part in."""

    def abort(self) -> None: ...


class Watcher(Protocol):
    """What waits for several ranks at once."""

    def heard_failure(self, number: int) -> None:
        """The order of that number failed. Called on the I/O thread: must not block."""


class Ranks:
    """The other ranks of the trainer, by rank. Calls end by their deadline; thread-safe but for ``collectively``."""

    def __init__(self, holder: Holder, coordinator: Coordinator, size: int = 1) -> None:
        self._holder, self._coordinator, self._size = holder, coordinator, size
        self._members: dict[int, Member] = {}
        self._layouts: dict[int, LayoutTable] = {}
        self._holdings: tuple[list[object], Holdings] | None = None
        self._numbers = itertools.count(1)
        self._pairs = itertools.count(1)
        self._call = 0
        self._open: set[Abortable] = set()
        self._watchers: dict[int, Watcher] = {}
        self._lock = threading.Lock()
        self.manifest = holder.source.manifest
        """What all ranks together publish, once they have met in a call."""
        self.deadline = Deadline(1.0)
        """That of the call that runs."""

    @property
    def _source(self) -> Source:
        return self._holder.source

    @property
    def alone(self) -> bool:
        return self._size == 1

    def ticket(self) -> str:
        """Admits every other rank once."""
        return self._coordinator.issue_ticket(RANKS, self._size - 1, is_trusted=True)

    # -- collective calls

    def collectively(self, what: str, deadline: Deadline, work: Callable[[], T]) -> T:
        """Do ``work`` as the leader's part of a call that all ranks make; they return its Report or raise its error."""
        if self.alone:
            return work()
        self._call += 1
        self.deadline = deadline
        try:
            self._enter(what, deadline)
            result = work()
        except BaseException as error:
            self._finish(Finish.failed(error))
            raise
        self._finish(Finish(report=result.to_json() if isinstance(result, Report) else ""))
        return result

    def _enter(self, what: str, deadline: Deadline) -> None:
        self._coordinator.clear_inboxes(self._members.values())
        is_new = not self._members
        if is_new:
            self._wait_for_all(deadline)
        self._ask_all(Enter(what=what, timeout_s=deadline.limit_s()), deadline, phase="join")
        if is_new or not self._layouts:
            self._survey(deadline)

    def _wait_for_all(self, deadline: Deadline) -> None:
        try:
            members = self._coordinator.wait_members(RANKS, self._size - 1, deadline)
        except DeadlineExceeded:
            present = {member.rank + 1 for member in self._coordinator.members(RANKS)}
            missing = sorted(set(range(1, self._size)) - present)
            raise DeadlineExceeded(
                f"trainer ranks {missing} did not come within {deadline.timeout_s:g} s", phase="join", hint=LATE_HINT
            ) from None
        self._members = {member.rank + 1: member for member in members}
        for member in members:
            member.on_trouble = self._wake

    def _survey(self, deadline: Deadline) -> None:
        """Learn what every rank holds; together that has to be all of every tensor."""
        answers = self._ask_all(Survey(), deadline, phase="join")
        layouts, manifests = {}, {}
        for rank, answer in answers.items():
            assert answer.layout is not None
            assert answer.manifest is not None
            answer.layout.check(answer.manifest)
            layouts[rank], manifests[rank] = answer.layout, answer.manifest
        manifest = joined_manifest({RANK_0: self._source.manifest, **manifests})
        layouts = {rank: layout.of_manifest(manifests[rank], manifest) for rank, layout in layouts.items()}
        check_complete(Holdings.of(manifest, {RANK_0: self._source.layout, **layouts}))
        self._ask_all(Agree(manifest=manifest), deadline, phase="join")
        self.manifest, self._layouts = manifest, layouts

    def _finish(self, order: Finish) -> None:
        members = self._members or {member.rank + 1: member for member in self._coordinator.members(RANKS)}
        for member in members.values():
            self.post(member, order)

    def _wake(self, trouble: Failed | RankAnswer | None) -> None:
        """A rank is gone, or could not do its part: end whatever waits for bytes that it will not send."""
        if isinstance(trouble, RankAnswer):
            watcher = self._watchers.get(trouble.number)
            if watcher is not None:
                watcher.heard_failure(trouble.number)
            return
        with self._lock:
            pairs = list(self._open)
        for pair in pairs:
            pair.abort()

    def renew(self, deadline: Deadline) -> bool:
        """Have all ranks, this one too, look at their sources anew; True when one of them made another one.

        When a rank cannot, its error is raised, and what the others hold is learnt in the next call.
        """
        posted = {rank: self.post(member, Renew()) for rank, member in self._members.items()}
        known, self._layouts = self._layouts, {}
        renewed = self._holder.renew()
        answers = [self.hear(rank, number, deadline, phase="join") for rank, number in posted.items()]
        if any(answer.moved for answer in answers) or (renewed and posted):
            self._survey(deadline)
            return True
        self._layouts = known
        if renewed:
            self.manifest = self._source.manifest
            check_complete(Holdings.of(self.manifest, {RANK_0: self._source.layout}))
        return renewed

    # -- orders

    def post(self, member: Member, order: Order, watcher: Watcher | None = None) -> int:
        """Give an order and do not wait; its number. ``watcher`` is told at once when it fails, until ``unwatch``."""
        number = next(self._numbers)
        if watcher is not None:
            self._watchers[number] = watcher
        self._coordinator.send(member, RankOrder(call=self._call, number=number, body=encode(order)))
        return number

    def hear(
        self,
        rank: int,
        number: int,
        deadline: Deadline,
        *,
        phase: str,
        cancelled: Callable[[], WeightcastError | None] = lambda: None,
    ) -> Answer:
        """The answer to an order; raises the rank's own error, PeerLost or DeadlineExceeded, all of them with the rank."""
        member = self._members[rank]
        try:
            message = self._coordinator.take(
                member,
                RankAnswer,
                deadline,
                phase=phase,
                matches=lambda said: isinstance(said, RankAnswer) and said.number == number,
                cancelled=cancelled,
            )
        except PeerLost:
            raise self._loss(rank, member, phase) from None
        except DeadlineExceeded:
            raise DeadlineExceeded(
                f"trainer rank {rank} did not answer within {deadline.timeout_s:g} s", phase=phase, hint=LATE_HINT
            ) from None
        assert isinstance(message, RankAnswer)
        answer = decode_answer(message.body)
        if answer.error is not None:
            error = answer.error.error().at(phase=phase)
            error.message = f"trainer rank {rank}: {error.message}"
            raise error
        return answer

    def _ask_all(self, order: Order, deadline: Deadline, *, phase: str) -> dict[int, Answer]:
        posted = {rank: self.post(member, order) for rank, member in self._members.items()}
        return {rank: self.hear(rank, number, deadline, phase=phase) for rank, number in posted.items()}

    @staticmethod
    def _loss(rank: int, member: Member, phase: str) -> PeerLost:
        return PeerLost(f"trainer rank {rank} is gone: {member.lost}", phase=phase, hint=LOST_HINT)

    def lost(self, phase: str) -> PeerLost | None:
        """The loss of a rank, as far as it is known."""
        gone = ((rank, member) for rank, member in self._members.items() if member.lost is not None)
        return next((self._loss(rank, member, phase) for rank, member in gone), None)

    def losses(self, phase: str) -> dict[str, WeightcastError]:
        """Ranks that are gone, as errors by name; asks them all whether they live, which takes a moment at most."""
        if not self._members:
            return {}
        self._coordinator.probe(self._members.values())
        lost = {rank: member for rank, member in self._members.items() if member.lost is not None}
        return {f"trainer rank {rank}": self._loss(rank, member, phase) for rank, member in lost.items()}

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
        others = {} if self._source.layout.is_streamed else self._members
        return [
            local_facts(self._source.device, files=self._source.memory.files),
            *(member.hello.facts for member in others.values()),
        ]

    def adopt(self, transports: Sequence[str], deadline: Deadline) -> bool:
        """Have all other ranks make their memory reachable; whether one of them moved it."""
        if not self._members or not transports:
            return False
        answers = self._ask_all(Adopt(transports=tuple(sorted(transports))), deadline, phase="setup")
        for rank, answer in answers.items():
            assert answer.layout is not None
            self._layouts[rank] = answer.layout
        return any(answer.moved for answer in answers.values())

    def let_go(self, own: Callable[[], None], deadline: Deadline, *, always: bool = False) -> None:
        """Have all ranks release memory, this one by ``own``; returns, or raises the first error, when all have done so."""
        posted = {rank: self.post(member, LetGo(always=always)) for rank, member in self._members.items()}
        errors: list[Exception] = []
        try:
            own()
        except Exception as error:  # noqa: BLE001 - the others are waited for in any case
            errors.append(error)
        for rank, number in posted.items():
            try:
                self.hear(rank, number, deadline, phase="release")
            except WeightcastError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def refresh(self, deadline: Deadline) -> None:
        """Have all ranks, this one too, hold the values to publish now."""
        order = Refresh(timeout_s=deadline.limit_s())
        posted = {rank: self.post(member, order) for rank, member in self._members.items()}
        failure: WeightcastError | None = None
        try:
            self._source.deadline = deadline
            self._source.refresh()
        except WeightcastError as error:
            failure = error
        for rank, number in posted.items():
            try:
                self.hear(rank, number, deadline, phase="gather")
            except WeightcastError as error:
                # What keeps a rank from going on is told rather than that others could not go on without it.
                if failure is None or failure.message == OTHERS_DIFFER:
                    failure = error
        if failure is not None:
            raise failure

    def exhaust(self) -> Callable[[Deadline], None]:
        """Have all other ranks read their streams to the end, beside this one; the call that is returned waits for them."""
        posted = {rank: self.post(member, Exhaust()) for rank, member in self._members.items()}

        def wait(deadline: Deadline) -> None:
            for rank, number in posted.items():
                self.hear(rank, number, deadline, phase="transfer")

        return wait

    def expected(
        self, key: str, plan: Plan, deadline: Deadline, manifest: Manifest | None = None
    ) -> ExpectedDigest | SharedDigest:
        """The digest of a plan's values, each rank's part computed where it lies; at the positions of ``manifest``, or of what is
        published."""
        source = self._source
        own = expected_digest(
            manifest or self.manifest, plan.get(RANK_0, ()), source.memory, is_streamed=source.layout.is_streamed
        )
        others = {rank: self._members[rank] for rank in plan if rank != RANK_0}
        if not others:
            return own
        posted = {
            rank: self.post(
                member, Expect(key=key, copies=CopyColumns.of(plan[rank], manifest or self.manifest), manifest=manifest)
            )
            for rank, member in others.items()
        }
        for rank, number in posted.items():
            self.hear(rank, number, deadline, phase="setup")
        return SharedDigest(self, key, own, others)

    def keep_expected(self, keys: Iterable[str]) -> None:
        """Have the other ranks expect nothing any more but what has these keys; nobody waits for that."""
        order = Keep(keys=tuple(sorted(keys)))
        for member in self._members.values():
            self.post(member, order)

    def pair(
        self, transport: str, plan: Plan, count: int, bucket_nbytes: int, deadline: Deadline
    ) -> list[tuple[dict[int, int], list[Offer]]]:
        """Have the other ranks make their ends of the pairs with a group of ``count`` workers that want what the plan says; for
        each worker the pair numbers by rank, and the offers."""
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
                )
                posted[rank] = self.post(self._members[rank], order)
        try:
            for rank, number in posted.items():
                answer = self.hear(rank, number, deadline, phase="setup")
                if len(answer.offers) != count:
                    raise ProtocolError(f"trainer rank {rank} made {len(answer.offers)} offers for {count} pairs")
                for (_, offers), data in zip(made, answer.offers, strict=True):
                    offers.append(Offer(rank=rank, transport=transport, data=data))
        except BaseException:
            for numbers, _ in made:
                for rank, pair in numbers.items():
                    self.tell(rank, Release(pair=pair))
            raise
        return made

    def tell(self, rank: int, order: Order, watcher: Watcher | None = None) -> int:
        """``post`` by rank."""
        return self.post(self._members[rank], order, watcher)

    def unwatch(self, numbers: Iterable[int]) -> None:
        """Nobody needs to be told any more of orders that fail."""
        for number in numbers:
            self._watchers.pop(number, None)

    def keep(self, pair: Abortable) -> None:
        """Abort this pair when a rank is lost, until ``drop``."""
        with self._lock:
            self._open.add(pair)

    def drop(self, pair: Abortable) -> None:
        with self._lock:
            self._open.discard(pair)


class SharedDigest:
    """An expected digest that several ranks have a part of."""

    def __init__(self, ranks: Ranks, key: str, own: ExpectedDigest, others: Mapping[int, Member]) -> None:
        self._ranks, self._key, self._own, self._others = ranks, key, own, others

    def of(self, memory: Memory, check: Callable[[], None]) -> int:
        """The sum of all parts; the other ranks compute theirs meanwhile. ``check`` is that of an ExpectedDigest."""
        deadline = self._ranks.deadline
        order = Digest(key=self._key, timeout_s=deadline.limit_s())
        posted = {rank: self._ranks.post(member, order) for rank, member in self._others.items()}
        parts = [self._own.of(memory, check)]
        for rank, number in posted.items():
            parts.append(self._ranks.hear(rank, number, deadline, phase="verify").value)
        return combine(parts)

    def non_finite(self, memory: Memory, check: Callable[[], None]) -> dict[str, int]:
        """How many values of all ranks are NaN or infinite, by tensor."""
        deadline = self._ranks.deadline
        order = CountNonFinite(key=self._key, timeout_s=deadline.limit_s())
        posted = {rank: self._ranks.post(member, order) for rank, member in self._others.items()}
        parts: list[Mapping[str, int]] = [self._own.non_finite(memory, check)]
        parts += [self._ranks.hear(rank, n, deadline, phase="check").counts for rank, n in posted.items()]
        return added(parts)

    def start(self, memory: Memory, check: Callable[[], None]) -> Callable[[], int]:
        """``of`` in two steps, of which the second does all: the other ranks' answers have to be waited for anyhow."""
        return partial(self.of, memory, check)

    def take(self, window: int, memory: Memory, check: Callable[[], None]) -> None:
        """Nothing: streams have one rank's part only."""

    def begin(self, memory: Memory) -> None:
        """That of this rank's part: every rank begins its own."""
        self._own.begin(memory)

    def forget(self) -> None:
        self._own.forget()


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def joined_manifest(manifests: Mapping[int, Manifest]) -> Manifest:
    """Rank 0's tensors and whatever only others have, in order of rank; PlanMismatch where two ranks differ in a tensor."""
    specs: dict[str, tuple[int, TensorSpec]] = {}
    for rank, manifest in sorted(manifests.items()):
        for spec in manifest.tensors:
            first, known = specs.setdefault(spec.name, (rank, spec))
            if known != spec:
                raise PlanMismatch(
                    f"{spec.name!r} is {known.dtype} {known.shape} on trainer rank {first}, "
                    f"{spec.dtype} {spec.shape} on rank {rank}",
                    hint="A plain tensor counts as whole: give shards as DTensors",
                )
    return Manifest.of(spec for _, spec in specs.values())
