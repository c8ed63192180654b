"""Line: rank 0's line to the other trainer ranks. Orders go out, each rank's answers come back, and a rank that is gone is noticed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, WeightcastError
from weightcast.messages import Failed, RankAnswer, RankOrder
from weightcast.trainer.ranks.orders import Answer, Order, decode_answer, encode

RANKS = "trainer ranks"
"""The name under which trainer ranks join the control channel."""
LOST_HINT = "Start that rank again, then make a new Publisher on every rank; engines go on with what they serve"
LATE_HINT = "Every rank has to call connect() and publish(), in the same order"


class Abortable(Protocol):
    """A pair that several ranks have a part in."""

    def abort(self) -> None: ...


class Watcher(Protocol):
    """What waits for several ranks at once."""

    def heard_failure(self, number: int) -> None:
        """The order of that number failed. Called on the I/O thread: must not block."""


class Line:
    """The other ranks as members of the control channel, by rank. Waits end by their deadline; thread-safe but for ``meet``."""

    def __init__(self, coordinator: Coordinator, size: int) -> None:
        self._coordinator, self._size = coordinator, size
        self._members: dict[int, Member] = {}
        self._numbers = itertools.count(1)
        self._call = 0
        self._open: set[Abortable] = set()
        self._watchers: dict[int, Watcher] = {}
        self._lock = threading.Lock()

    def ticket(self) -> str:
        """Admits every other rank once."""
        return self._coordinator.issue_ticket(RANKS, self._size - 1, is_trusted=True)

    # -- calls of all ranks

    def next_call(self) -> None:
        """Orders from here on belong to a new collective call; answers of former calls are dropped."""
        self._call += 1
        self._coordinator.clear_inboxes(self._members.values())

    def meet(self, deadline: Deadline) -> bool:
        """Wait until all other ranks are there; True where they were not before. DeadlineExceeded names those that are missing."""
        if self._members:
            return False
        try:
            members = self._coordinator.wait_members(RANKS, self._size - 1, deadline)
        except DeadlineExceeded:
            present = {member.rank + 1 for member in self._coordinator.members(RANKS)}
            missing = sorted(set(range(1, self._size)) - present)
            raise deadline.exceeded(
                "waiting for trainer ranks",
                f"trainer ranks {missing} did not come within {deadline.timeout_s:g} s",
                phase="join",
                hint=LATE_HINT,
            ) from None
        self._members = {member.rank + 1: member for member in members}
        for member in members:
            member.on_trouble = self._wake
        return True

    def tell_whoever_is_there(self, order: Order) -> None:
        """Give an order that is not answered to all other ranks, also to those that came before all were there."""
        members = self._members or {member.rank + 1: member for member in self._coordinator.members(RANKS)}
        for member in members.values():
            self._send(member, order)

    # -- orders

    def post(self, rank: int, order: Order, watcher: Watcher | None = None) -> int:
        """Give an order and do not wait; its number. ``watcher`` is told at once when it fails, until ``unwatch``."""
        return self._send(self._members[rank], order, watcher)

    def post_all(self, order: Order) -> dict[int, int]:
        """Give every other rank an order and do not wait; the orders' numbers by rank."""
        return {rank: self.post(rank, order) for rank in self._members}

    def ask_all(self, order: Order, deadline: Deadline, *, phase: str) -> dict[int, Answer]:
        """Give every other rank an order and wait for all answers. Raises the first error."""
        return self.hear_all(self.post_all(order), deadline, phase=phase)

    def hear_all(self, posted: dict[int, int], deadline: Deadline, *, phase: str) -> dict[int, Answer]:
        """The answers to orders, by rank. Raises the first error."""
        return {rank: self.hear(rank, number, deadline, phase=phase) for rank, number in posted.items()}

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
            raise _loss(rank, member, phase) from None
        except DeadlineExceeded:
            raise deadline.exceeded(
                "waiting for a trainer rank",
                f"trainer rank {rank} did not answer within {deadline.timeout_s:g} s",
                phase=phase,
                hint=LATE_HINT,
            ) from None
        assert isinstance(message, RankAnswer)
        answer = decode_answer(message.body)
        if answer.error is not None:
            error = answer.error.error().at(phase=phase)
            error.message = f"trainer rank {rank}: {error.message}"
            raise error
        return answer

    def unwatch(self, numbers: Iterable[int]) -> None:
        """Nobody needs to be told any more of orders that fail."""
        for number in numbers:
            self._watchers.pop(number, None)

    def _send(self, member: Member, order: Order, watcher: Watcher | None = None) -> int:
        number = next(self._numbers)
        if watcher is not None:
            self._watchers[number] = watcher
        self._coordinator.send(member, RankOrder(call=self._call, number=number, body=encode(order)))
        return number

    # -- losses

    def keep(self, pair: Abortable) -> None:
        """Abort this pair when a rank is lost, until ``drop``."""
        with self._lock:
            self._open.add(pair)

    def drop(self, pair: Abortable) -> None:
        with self._lock:
            self._open.discard(pair)

    def lost(self, phase: str) -> PeerLost | None:
        """The loss of a rank, as far as it is known."""
        gone = ((rank, member) for rank, member in self._members.items() if member.lost is not None)
        return next((_loss(rank, member, phase) for rank, member in gone), None)

    def losses(self, phase: str) -> dict[str, WeightcastError]:
        """Ranks that are gone, as errors by name; asks them all whether they live, which takes a moment at most."""
        if not self._members:
            return {}
        self._coordinator.probe(self._members.values())
        lost = {rank: member for rank, member in self._members.items() if member.lost is not None}
        return {f"trainer rank {rank}": _loss(rank, member, phase) for rank, member in lost.items()}

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


def _loss(rank: int, member: Member, phase: str) -> PeerLost:
    return PeerLost(f"trainer rank {rank} is gone: {member.lost}", phase=phase, hint=LOST_HINT)
