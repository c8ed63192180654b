"""PairLink: two sides meet, call each other, and learn at once that the other one is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightcast.deadline import Deadline
from weightcast.errors import PeerLost
from weightcast.transports.guard import EndGuard
from weightcast.transports.pairlink import PairLink
from weightcast.transports.rendezvous import Listener


@pytest.fixture
def links() -> Iterator[tuple[PairLink, PairLink]]:
    guard = EndGuard("a test's end")
    listener = Listener("127.0.0.1", guard)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(PairLink.accept_from, listener, Deadline(10))
        worker = PairLink.dial_to("127.0.0.1", listener.port, listener.secret, Deadline(10), guard)
        trainer = accepted.result()
    listener.close()
    yield trainer, worker
    trainer.close()
    worker.close()


def test_calls_are_counted_and_disturb_no_check(links: tuple[PairLink, PairLink]) -> None:
    trainer, worker = links
    assert trainer.num_calls() == 0
    expected = 0
    for many in (1, 7, 5000):
        for _ in range(many):
            worker.call()
        expected += many
        limit = Deadline(10)
        while trainer.num_calls() < expected:
            limit.check("counting")
            trainer.check()
            PairLink.wait_any([trainer], 0.05)
        assert trainer.num_calls() == expected
    worker.check()


@pytest.mark.parametrize("has_called", [False, True])
def test_a_side_that_closes_is_gone_also_with_calls_unread(links: tuple[PairLink, PairLink], has_called: bool) -> None:
    trainer, worker = links
    if has_called:
        worker.call()
    worker.close()
    with pytest.raises(PeerLost, match="the worker is gone"):
        again_and_again(trainer.check)
    with pytest.raises(PeerLost):
        again_and_again(trainer.call)  # the first one after a close may still leave this side


def again_and_again(step: Callable[[], None]) -> None:
    limit = Deadline(10)
    while True:
        limit.check("noticing")
        step()
        time.sleep(0.01)


def test_waiting_ends_when_something_comes_and_by_its_time(links: tuple[PairLink, PairLink]) -> None:
    trainer, worker = links
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(PairLink.wait_any, [trainer], 60.0)
        worker.call()
        waiting.result(timeout=20)
    assert trainer.num_calls() == 1
    PairLink.wait_any([trainer], 0.01)
    trainer.close()
    PairLink.wait_any([trainer], 0.01)
    with pytest.raises(PeerLost):
        trainer.check()


def test_threads_may_check_at_the_same_time(links: tuple[PairLink, PairLink]) -> None:
    trainer, worker = links
    with ThreadPoolExecutor(8) as pool:
        checks = [pool.submit(lambda: [trainer.check() for _ in range(2000)]) for _ in range(8)]
        for check in checks:
            check.result()
    worker.check()
