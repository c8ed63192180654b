"""SharedDigest: an expected digest that several trainer ranks have a part of. Each part is computed where its values lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from weightcast.content.expected import ExpectedDigest
from weightcast.content.finite import added
from weightcast.deadline import Deadline
from weightcast.digest.formula import combine
from weightcast.layout.memory import Memory
from weightcast.trainer.ranks.line import Line
from weightcast.trainer.ranks.orders import CountNonFinite, Digest


class SharedDigest:
    """``own`` is this rank's part; the ``others`` keep theirs under ``key``. ``deadline`` gives that of the call that runs."""

    def __init__(
        self, line: Line, key: str, own: ExpectedDigest, others: Iterable[int], deadline: Callable[[], Deadline]
    ) -> None:
        self._line, self._key, self._own, self._others, self._deadline = line, key, own, tuple(others), deadline

    def of(self, memory: Memory, check: Callable[[], None]) -> int:
        """The sum of all parts; the other ranks compute theirs meanwhile. ``check`` is that of an ExpectedDigest."""
        deadline = self._deadline()
        order = Digest(key=self._key, timeout_s=deadline.limit_s())
        posted = {rank: self._line.post(rank, order) for rank in self._others}
        own = self._own.of(memory, check)
        answers = self._line.hear_all(posted, deadline, phase="verify")
        return combine([own, *(answer.value for answer in answers.values())])

    def non_finite(self, memory: Memory, check: Callable[[], None]) -> dict[str, int]:
        """How many values of all ranks are NaN or infinite, by tensor."""
        deadline = self._deadline()
        order = CountNonFinite(key=self._key, timeout_s=deadline.limit_s())
        posted = {rank: self._line.post(rank, order) for rank in self._others}
        own: Mapping[str, int] = self._own.non_finite(memory, check)
        answers = self._line.hear_all(posted, deadline, phase="check")
        return added([own, *(answer.counts for answer in answers.values())])

    def start(self, memory: Memory, check: Callable[[], None]) -> Callable[[], int]:
        """``of`` in two steps, of which the second does all: the other ranks' answers have to be waited for anyhow."""
        return partial(self.of, memory, check)

    def take(self, window: int, memory: Memory, check: Callable[[], None], known: int | None = None) -> None:
        """Nothing: streams have one rank's part only."""

    def begin(self, memory: Memory) -> None:
        """That of this rank's part: every rank begins its own."""
        self._own.begin(memory)

    def forget(self) -> None:
        self._own.forget()
