"""Delivery: how the bytes of one round get to its workers, and what trainer and workers tell each other about it.

Bytes are sent to workers that are pushed to, and shown to workers that pull. A stream comes in windows, whose turns say when a window may
be read and when its memory may be overwritten; weights that lie still are one window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from weightcast.control.coordinator import Member
from weightcast.deadline import Deadline
from weightcast.errors import GroupBroken, TransportError, WeightcastError
from weightcast.messages import Begin, Committed, Filled, Message, Read, Staged
from weightcast.trainer.fleet.chains import choose_feeding
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import Cancelled, RoundBook
from weightcast.trainer.round.windows import WindowTurns

Pair = tuple[EngineLink, WorkerLink]

REASON_S = 1.0
"""How long a worker whose connection broke may take to say why."""


class Delivery:
    """The bytes and messages of one round. Thread-safe: each engine's steps run on threads of their own."""

    def __init__(self, fleet: Fleet, outcomes: RoundBook, round: int, deadline: Deadline) -> None:
        self._coordinator, self._line = fleet.coordinator, fleet.ranks.line
        self._is_streamed = fleet.source.layout.is_streamed
        self._outcomes = outcomes
        self.epoch, self.round, self.deadline = fleet.epoch, round, deadline
        self.turns = WindowTurns()
        """Those of the reading that runs."""

    # -- bytes

    def show(self, pairs: Sequence[Pair], part: int = 0) -> None:
        """Make the values of a part visible to those workers that pull."""
        for engine, worker in pairs:
            if worker.pulls:
                self._outcomes.guard(engine, "begin", partial(self._show, engine, worker, part))

    def show_window(self, pairs: Sequence[Pair], window: int) -> None:
        """A window is filled: have workers read it."""
        for engine, worker in pairs:
            if worker.pulls:
                self._outcomes.guard(engine, "begin", partial(self._show_window, engine, worker, window))

    def give(self, engine: EngineLink, worker: WorkerLink, kind: type[Message], phase: str, deadline: Deadline) -> None:
        """Have the worker get all parts that are meant for it. ``kind`` is what the worker says when it has all of them."""
        has_pipes = worker.end is not None and worker.end.pipes is not None
        for part in worker.parts:
            if not (has_pipes and self._is_streamed):  # what is read was filled before
                self.turns.wait_filled(part, deadline, partial(self._over, engine))
            if not worker.pulls:
                try:
                    self._send(worker, deadline, part)
                except TransportError as error:
                    self._ask_why(engine, worker, error, kind, phase)
            elif self._is_streamed:
                self._wait_read(engine, worker, part, phase, deadline)
            self.turns.release(worker.member.key, part)

    def _send(self, worker: WorkerLink, deadline: Deadline, part: int) -> None:
        codec = worker.codec
        if worker.end is not None and codec.is_kept:
            codec.sent_nbytes = worker.end.send_kept(self.round, deadline, changes=codec.changes)
        elif worker.end is not None:
            codec.sent_nbytes = worker.end.send(deadline, part)

    def leave(self, worker: WorkerLink) -> None:
        """The worker reads no window any more."""
        self.turns.leave(worker.member.key)

    def _show(self, engine: EngineLink, worker: WorkerLink, part: int) -> None:
        try:
            self._send(worker, self.deadline, part)
        except TransportError as error:
            self._ask_why(engine, worker, error, Committed if worker.in_place else Staged, "begin")

    def _show_window(self, engine: EngineLink, worker: WorkerLink, window: int) -> None:
        self._show(engine, worker, window)
        pipes = worker.end.pipes if worker.end is not None else None
        if pipes is None:
            self.tell(worker, Filled(epoch=self.epoch, round=self.round, window=window))
        else:
            pipes.tell(self.round, window)

    def _wait_read(self, engine: EngineLink, worker: WorkerLink, window: int, phase: str, deadline: Deadline) -> None:
        """Wait until the worker has read a window, whose memory may be overwritten then."""
        pipes = worker.end.pipes if worker.end is not None else None
        if pipes is not None:

            def check() -> None:
                if deadline.passed:
                    self.turns.wait_filled(window, deadline, partial(self._over, engine))
                self._check(engine, worker, phase, deadline)

            pipes.wait(self.round, window, deadline, check)
            return

        def is_it(said: Message) -> bool:
            return getattr(said, "window", window) == window

        self.take(engine, worker, Read, phase, deadline, matches=is_it)

    # -- messages

    def choose(self, pairs: Sequence[Pair]) -> None:
        """Choose for each worker whether it gets all values or what changed, and whether chains are used."""
        for _, worker in pairs:
            worker.codec.choose()
        choose_feeding([worker for _, worker in pairs])

    def begin(self, pairs: Sequence[Pair]) -> None:
        """Open the round in these workers."""
        for engine, worker in pairs:
            worker.at = (self.epoch, self.round)
            begin = Begin(
                epoch=self.epoch,
                round=self.round,
                base=engine.base,
                changes=worker.codec.changes,
                timeout_s=self.deadline.limit_s(),
            )
            self.tell(worker, begin)

    def tell(self, worker: WorkerLink, message: Message) -> None:
        self._coordinator.send(worker.member, message)

    def take(
        self,
        engine: EngineLink,
        worker: WorkerLink,
        kind: type[Message],
        phase: str,
        deadline: Deadline,
        *,
        cancellable: bool = True,
        matches: Callable[[Message], bool] = lambda _: True,
    ) -> Message:
        """Wait for what a worker says of this round. Raises what the worker says instead, its loss, DeadlineExceeded, and, where it is
        ``cancellable``, Cancelled once the engine has no more part in the round."""

        def is_this_round(message: Message) -> bool:
            return self._is_of_round(message) and matches(message)

        def cancelled() -> WeightcastError | None:
            return self._over(engine) if cancellable else None

        return self._coordinator.take(
            worker.member, kind, deadline, phase=phase, matches=is_this_round, cancelled=cancelled
        )

    def _check(self, engine: EngineLink, worker: WorkerLink, phase: str, deadline: Deadline) -> None:
        """Raise what ``take`` would raise now."""
        self._coordinator.check(
            worker.member, deadline, phase=phase, matches=self._is_of_round, cancelled=partial(self._over, engine)
        )

    def take_each(
        self, pairs: Sequence[Pair], kind: type[Message], phase: str, deadline: Deadline, *, cancellable: bool = True
    ) -> Iterator[tuple[EngineLink, WorkerLink, Message | WeightcastError]]:
        """``take`` from many workers on one thread: each with what it said, or with the error that ``take`` would raise, as they come."""
        by_member = {worker.member: (engine, worker) for engine, worker in pairs}

        def cancelled(member: Member) -> WeightcastError | None:
            return self._over(by_member[member][0]) if cancellable else None

        said = self._coordinator.take_each(
            list(by_member), kind, deadline, phase=phase, matches=self._is_of_round, cancelled=cancelled
        )
        for member, message in said:
            yield *by_member[member], message

    def _is_of_round(self, message: Message) -> bool:
        return (getattr(message, "epoch", 0), getattr(message, "round", 0)) == (self.epoch, self.round)

    def _over(self, engine: EngineLink) -> WeightcastError | None:
        return Cancelled("the round failed elsewhere") if self._outcomes.is_over(engine) else None

    def _ask_why(
        self, engine: EngineLink, worker: WorkerLink, error: WeightcastError, kind: type[Message], phase: str
    ) -> None:
        """Raise what the worker itself says about a broken connection, or the error when the worker says nothing."""
        if self._outcomes.is_over(engine) or isinstance(error, GroupBroken):
            raise Cancelled("the round failed elsewhere")
        lost = self._line.lost(phase)
        if lost is not None:
            raise lost
        with contextlib.suppress(TimeoutError, Cancelled):
            self.take(engine, worker, kind, phase, self.deadline.part(at_most_s=REASON_S))
        named = worker.named(error)
        if named is error:
            raise error
        raise named from error
