"""Together: one thread does the work for all, and a failure ends all waits with the right name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, GroupBroken, PeerLost, TransportError
from weightcast.transports.together import Blamed, Together

SIZE = 5


def all_do(
    together: Together, work: Callable[[], None], timeout_s: float = 20.0, absent: tuple[int, ...] = ()
) -> dict[int, BaseException | None]:
    """What each member's thread raised."""

    def one(member: int) -> BaseException | None:
        try:
            together.do(member, "send", Deadline(timeout_s), work, lambda: None)
        except Exception as error:
            return error
        return None

    members = [member for member in range(SIZE) if member not in absent]
    with ThreadPoolExecutor(SIZE) as pool:
        return dict(zip(members, pool.map(one, members), strict=True))


def test_one_works_for_all_again_and_again() -> None:
    together, done = Together(SIZE), []
    for number in range(20):
        assert set(all_do(together, lambda number=number: done.append(number)).values()) == {None}  # type: ignore[misc]
    assert done == list(range(20))
    assert together.failure is None


def test_nobody_returns_before_the_work_is_done() -> None:
    together, log = Together(2), []

    def member(number: int) -> None:
        together.do(number, "send", Deadline(20), lambda: (time.sleep(0.1), log.append("work")), lambda: None)  # type: ignore[arg-type, return-value]
        log.append("back")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(member, range(2)))
    assert log == ["work", "back", "back"]


def test_a_failure_has_its_own_class_only_for_whom_it_is_about() -> None:
    together, lost = Together(SIZE), PeerLost("the worker is gone")

    def work() -> None:
        raise Blamed(3, lost)

    raised = all_do(together, work)
    assert raised.pop(3) is lost
    assert {type(error) for error in raised.values()} == {GroupBroken}
    assert {type(error) for error in all_do(together, lambda: None).values()} == {PeerLost, GroupBroken}


def test_a_failure_that_is_nobodys_is_raised_by_who_did_the_work() -> None:
    def work() -> None:
        raise TransportError("NCCL: unhandled system error")

    raised = list(all_do(Together(SIZE), work).values())
    assert sorted(type(error).__name__ for error in raised) == ["GroupBroken"] * (SIZE - 1) + ["TransportError"]


def test_a_passed_deadline_is_that_for_everybody() -> None:
    def work() -> None:
        raise DeadlineExceeded("sending weights")

    assert {type(error) for error in all_do(Together(SIZE), work).values()} == {DeadlineExceeded}
    assert {type(error) for error in all_do(Together(SIZE), work, 0.3, absent=(2,)).values()} == {DeadlineExceeded}


def test_whoever_gives_up_while_waiting_ends_the_waits_of_all() -> None:
    together, aborted = Together(3), threading.Event()

    def check() -> None:
        if aborted.is_set():
            raise TransportError("it was aborted")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(together.do, 0, "send", Deadline(20), lambda: None, check)
        second = pool.submit(together.do, 1, "send", Deadline(20), lambda: None, lambda: None)
        aborted.set()
        with pytest.raises(TransportError, match="it was aborted"):
            first.result()
        with pytest.raises(GroupBroken, match="it was aborted"):
            second.result()
    with pytest.raises(GroupBroken):
        together.do(2, "send", Deadline(20), lambda: None, lambda: None)


def test_a_deadline_that_passes_because_of_one_member_is_told_of_that_one() -> None:
    """The work knows who is late, and says so a little after the deadline of all."""
    late = DeadlineExceeded("the worker did not begin to receive")

    def work() -> None:
        time.sleep(1.5)
        raise Blamed(4, late)

    raised = all_do(Together(SIZE), work, timeout_s=1.0)
    assert raised.pop(4) is late
    assert {type(error) for error in raised.values()} == {GroupBroken}


def test_work_that_does_not_end_holds_nobody_for_ever() -> None:
    released = threading.Event()
    together = Together(2)
    with ThreadPoolExecutor(2) as pool:
        for member in range(2):
            pool.submit(together.do, member, "send", Deadline(0.2), lambda: released.wait(20) and None, lambda: None)
        try:
            limit = Deadline(10)
            while together.failure is None:
                limit.check("giving up")
                time.sleep(0.01)
            assert isinstance(together.failure, DeadlineExceeded)
        finally:
            released.set()
