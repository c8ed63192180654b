"""SharedEnd: the trainer's side of one worker's pairs, one with each rank that has something for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weightcast.deadline import LEAST_S, Deadline
from weightcast.errors import DeadlineExceeded, TransportError, WeightcastError
from weightcast.trainer.ranks.line import Line
from weightcast.trainer.ranks.orders import Abort, Connect, Order, Release, Send
from weightcast.transports.base import TrainerEnd
from weightcast.transports.window_pipes import WindowPipes


class SharedEnd:
    """Drives this rank's own end, if it has one, and those of other ranks, all at the same time.

    The first error ends all of them. Not thread-safe but for ``abort``.
    """

    def __init__(self, line: Line, own: TrainerEnd | None, pairs: Mapping[int, int]) -> None:
        self._line, self._own, self._pairs = line, own, pairs
        self._aborted = False
        self._closed = False
        self._first_failure: int | None = None
        self._feeds = True
        line.keep(self)

    @property
    def pipes(self) -> WindowPipes | None:
        """Those of this rank's own end: other ranks hold no streams."""
        return None if self._own is None else self._own.pipes

    def connect(self, deadline: Deadline) -> None:
        own = self._own

        def connect_own() -> None:
            if own is not None:
                own.connect(deadline)

        self._everywhere(lambda pair: Connect(pair=pair, timeout_s=deadline.limit_s()), connect_own, deadline, "setup")

    def feed(self, is_on: bool) -> None:
        self._feeds = is_on
        if self._own is not None:
            self._own.feed(is_on)

    def send(self, deadline: Deadline, part: int = 0) -> int:
        """``part`` is this rank's: others hold no streams, so that all of theirs is one."""
        own, sent = self._own, [0]

        def send_own() -> None:
            if own is not None:
                sent.append(own.send(deadline, part))

        others = self._everywhere(
            lambda pair: Send(pair=pair, timeout_s=deadline.limit_s(), feeds=self._feeds),
            send_own,
            deadline,
            "transfer",
        )
        return sum(sent) + others

    def look(self, number: int, deadline: Deadline) -> None:
        """This rank's part: nobody waits for what others find, who tell digests of all that they hold."""
        if self._own is not None:
            self._own.look(number, deadline)

    def send_kept(self, number: int, deadline: Deadline, *, changes: bool) -> int:
        own, sent = self._own, [0]

        def send_own() -> None:
            if own is not None:
                sent.append(own.send_kept(number, deadline, changes=changes))

        def order(pair: int) -> Send:
            return Send(pair=pair, timeout_s=deadline.limit_s(), number=number, changes=changes)

        return self._everywhere(order, send_own, deadline, "transfer") + sum(sent)

    def heard_failure(self, number: int) -> None:
        """Another rank could not do its part: nobody waits for the rest."""
        if self._first_failure is None:
            self._first_failure = number
        self.abort()

    def abort(self) -> None:
        self._aborted = True
        for rank, pair in self._pairs.items():
            self._line.post(rank, Abort(pair=pair))
        if self._own is not None:
            self._own.abort()

    def close(self) -> None:
        """Idempotent; other ranks close theirs before they do anything else for this one."""
        if self._closed:
            return
        self._closed = True
        self._line.drop(self)
        for rank, pair in self._pairs.items():
            self._line.post(rank, Release(pair=pair))
        if self._own is not None:
            self._own.close()

    def _everywhere(
        self, order: Callable[[int], Order], own: Callable[[], None], deadline: Deadline, phase: str
    ) -> int:
        """Order the others, do the own part, hear the others; the sum of their values. Raises what failed first."""

        def cancelled() -> WeightcastError | None:
            return TransportError("the pair was aborted", phase=phase) if self._aborted else None

        posted: dict[int, int] = {}
        try:
            for rank, pair in self._pairs.items():
                posted[rank] = self._line.post(rank, order(pair), self)
            own()
            return sum(
                self._line.hear(rank, number, deadline, phase=phase, cancelled=cancelled).value
                for rank, number in posted.items()
            )
        except WeightcastError as error:
            first = self._first_failure
            self.abort()
            lost = self._line.lost(phase)
            if lost is not None:
                raise lost from error
            for rank, number in posted.items():
                if number == first:
                    self._raise_told(rank, number, phase, error)
            raise
        finally:
            self._line.unwatch(posted.values())

    def _raise_told(self, rank: int, number: int, phase: str, error: WeightcastError) -> None:
        """Raise the error that a rank has told of, unless that is ``error`` itself: then nothing is left to be heard."""
        try:
            self._line.hear(rank, number, Deadline(LEAST_S), phase=phase)
        except DeadlineExceeded:
            return
        except WeightcastError as told:
            raise told from error
