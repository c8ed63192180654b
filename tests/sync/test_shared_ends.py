"""One rank's failure ends a transfer for all trainer ranks at once, with that rank's own error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightcast.control.coordinator import Coordinator
from weightcast.control.link import ControlLink, JoinInfo
from weightcast.deadline import Deadline
from weightcast.errors import DigestMismatch, ErrorForm, StateError, TransportError
from weightcast.messages import AnyMessage, Hello, RankAnswer, RankOrder
from weightcast.trainer.ranks.end import SharedEnd
from weightcast.trainer.ranks.line import RANKS, Line
from weightcast.trainer.ranks.orders import Abort, Answer, AnyOrder, decode_order, encode
from weightcast.transports.base import TrainerEnd
from weightcast.transports.facts import local_facts

HANG_S = 30.0
"""A wait that is not ended fails the test."""
Reply = Callable[[AnyOrder], Answer | None]


class Blocked(TrainerEnd):
    """Rank 0's own end: nothing comes until it is aborted."""

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def offer(self) -> bytes:
        return b""

    def connect(self, deadline: Deadline) -> None:
        if not self.aborted.wait(deadline.remaining_s()):
            raise StateError("nobody ended it")
        raise TransportError("the end was aborted")

    def send(self, deadline: Deadline, part: int = 0) -> int:
        self.connect(deadline)
        return 0

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.abort()


@pytest.fixture
def meet() -> Iterator[Callable[..., Line]]:
    """Rank 0 and other ranks that answer orders by functions."""
    coordinator = Coordinator()
    links: list[ControlLink] = []

    def made(*replies: Reply) -> Line:
        line = Line(coordinator, len(replies) + 1)
        info = JoinInfo(
            address=f"tcp://127.0.0.1:{coordinator.port}",
            public_key=coordinator.public_key,
            ticket=line.ticket(),
            engine=RANKS,
        )
        for number, reply in enumerate(replies):

            def on_message(message: AnyMessage, number: int = number, reply: Reply = reply) -> None:
                if isinstance(message, RankOrder):
                    answer = reply(decode_order(message.body))
                    if answer is not None:
                        failed = answer.error is not None
                        links[number].send(RankAnswer(number=message.number, body=encode(answer), failed=failed))

            links.append(ControlLink(info, on_message, lambda reason: None))
            facts = local_facts("cpu")
            links[-1].send(
                Hello(
                    ticket=info.ticket, engine=RANKS, rank=number, world_size=len(replies), facts=facts,
                    version="", digest="", dirty=False, highest=0,
                )
            )  # fmt: skip
        line.meet(Deadline(HANG_S))
        return line

    yield made
    for link in links:
        link.close()
    coordinator.close()


@pytest.mark.parametrize("call", ["connect", "send"])
def test_the_first_rank_to_fail_ends_it_for_all(meet: Callable[..., Line], call: str) -> None:
    orders: list[AnyOrder] = []

    def silent(order: AnyOrder) -> None:
        orders.append(order)

    def fails(order: AnyOrder) -> Answer | None:
        return None if isinstance(order, Abort) else Answer(error=ErrorForm.of(DigestMismatch("its bytes are torn")))

    own = Blocked()
    end = SharedEnd(meet(silent, fails), own, {1: 11, 2: 12})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getattr(end, call), Deadline(600.0))
        try:
            with pytest.raises(DigestMismatch, match="trainer rank 2: its bytes are torn"):
                waiting.result(HANG_S)
        finally:
            own.abort()
    assert own.aborted.is_set()
    end.close()


def test_the_own_error_is_raised_where_it_came_first(meet: Callable[..., Line]) -> None:
    def aborted(order: AnyOrder) -> Answer | None:
        return Answer(error=ErrorForm.of(TransportError("the end was aborted"))) if isinstance(order, Abort) else None

    class Fails(Blocked):
        def connect(self, deadline: Deadline) -> None:
            raise StateError("not today")

    end = SharedEnd(meet(aborted), Fails(), {1: 11})
    with pytest.raises(StateError, match="not today"):
        end.connect(Deadline(HANG_S))
    end.close()
