"""Tcp whose pairs depend on each other as those of one NCCL communicator do, for tests without GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, WeightcastError
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.plan import Copy
from weightcast.transports.base import TrainerEnd
from weightcast.transports.tcp import TcpTransport
from weightcast.transports.together import Blamed, Together


class SharedEnd(TrainerEnd):
    """A tcp end that does nothing before all ends of its group are there, as those of one communicator."""

    def __init__(self, inner: TrainerEnd, member: int, together: Together, ends: list[SharedEnd]) -> None:
        self.inner, self.member, self.together, self.ends = inner, member, together, ends
        self.fault: Callable[[str], WeightcastError | None] = lambda what: None
        self.aborted = False

    def offer(self) -> bytes:
        return self.inner.offer()

    def connect(self, deadline: Deadline) -> None:
        self._all("connect", deadline, lambda: self.inner.connect(deadline))

    def send(self, deadline: Deadline, part: int = 0) -> int:
        self._all("send", deadline, lambda: None)
        return self.inner.send(deadline, part)

    def abort(self) -> None:
        self.aborted = True
        self.inner.abort()

    def close(self) -> None:
        self.together.fail(PeerLost("closed"))
        for end in self.ends:
            end.inner.close()

    def _all(self, what: str, deadline: Deadline, own: Callable[[], object]) -> None:
        try:
            own()
            self.together.do(self.member, what, deadline, lambda: self._work(what), self._check)
        except BaseException as error:
            self.together.fail(error, self.member)
            for end in self.ends:
                end.inner.abort()
            raise

    def _work(self, what: str) -> None:
        for end in self.ends:
            error = end.fault(what)
            if error is not None:
                raise Blamed(end.member, error)

    def _check(self) -> None:
        if self.aborted:
            raise PeerLost("aborted")


class SharingTcp(TcpTransport):
    """``groups`` are those that were made in this process, each as its ends."""

    name = "shared_tcp"
    carries_changes = False

    def __init__(self) -> None:
        self.groups: list[list[SharedEnd]] = []

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups]

    def sharing(self, workers: Sequence[Facts]) -> list[list[int]]:
        return [list(range(len(workers)))]

    def trainer_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = TcpTransport.default_bucket_nbytes,
        address: str = "",
    ) -> list[TrainerEnd]:
        inner = super().trainer_ends(count, copies, memory, bucket_nbytes=bucket_nbytes, address=address)
        together, ends = Together(count), list[SharedEnd]()
        ends += [SharedEnd(end, member, together, ends) for member, end in enumerate(inner)]
        self.groups.append(ends)
        return list(ends)
