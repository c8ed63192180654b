"""Calls to engines: one deadline for all of an HTTP call, and all engines of a fleet called at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from tests.support.callers import serving

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, RoundFailed
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.clients.base import AnswerLost

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
LONG_S = 600.0
"""Longer than a test may take."""


def silent(caller: socket.socket, stop: threading.Event) -> None:
    stop.wait(LONG_S)


def dripping_headers(caller: socket.socket, stop: threading.Event) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not stop.wait(0.05):
        caller.sendall(b"x")


def dripping_body(caller: socket.socket, stop: threading.Event) -> None:
    caller.recv(65536)
    caller.sendall(HEAD)
    while not stop.wait(0.05):
        caller.sendall(b" ")


def breaking_off(caller: socket.socket, stop: threading.Event) -> None:
    caller.recv(65536)
    caller.sendall(HEAD + b"{")


def reading_nothing(caller: socket.socket, stop: threading.Event) -> None:
    """The request fills the socket's buffers and never gets through."""
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stop.wait(LONG_S)


@pytest.mark.parametrize("behave", [silent, dripping_headers, dripping_body])
def test_a_server_that_stalls_or_drips_holds_nobody_past_the_deadline(
    behave: Callable[[socket.socket, threading.Event], None],
) -> None:
    late = pytest.raises(DeadlineExceeded, match=r"/weightcast/status took longer than 0\.7 s")
    with serving(behave) as url, late:
        HttpEngineClient(url).status(Deadline(0.7))


def test_a_server_that_does_not_read_holds_nobody_past_the_deadline() -> None:
    with serving(reading_nothing) as url, pytest.raises(DeadlineExceeded):
        HttpEngineClient(url).init({"ticket": "x" * (64 << 20)}, Deadline(1.0))


def test_a_deadline_that_another_thread_moves_ends_a_wait_that_has_begun() -> None:
    deadline = Deadline(LONG_S)

    def move() -> None:
        time.sleep(0.3)
        deadline.at = time.monotonic()

    with serving(dripping_body) as url:
        threading.Thread(target=move).start()
        with pytest.raises(DeadlineExceeded):
            HttpEngineClient(url).status(deadline)


def test_an_answer_that_breaks_off_is_lost_and_a_closed_port_is_nobody() -> None:
    with serving(breaking_off) as url, pytest.raises(AnswerLost):
        HttpEngineClient(url).status(Deadline(5))
    with pytest.raises(PeerLost) as caught:
        HttpEngineClient(url).status(Deadline(5))
    assert not isinstance(caught.value, AnswerLost), "nothing was sent"


WEIGHTS = {"w": torch.randn(16, 8)}


def fleet(*modes: str) -> list[LocalEngine]:
    return [
        LocalEngine(f"e{number}", [DictModel({"w": torch.zeros(16, 8)})], mode=mode)
        for number, mode in enumerate(modes)
    ]


def meet(engines: list[LocalEngine], phase: str) -> list[str]:
    """Have the calls of one phase wait for each other: they end only if all engines are called at once."""
    barrier, met = threading.Barrier(len(engines)), []
    for engine in engines:

        def wait(called: str, name: str = engine.name) -> None:
            if called == phase:
                barrier.wait(10)
                met.append(name)

        engine.before = wait
    return met


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("phase", ["init", "commit"])
def test_all_engines_are_called_at_once(phase: str, mode: str) -> None:
    engines = fleet(mode, mode, mode)
    met = meet(engines, phase)
    with Publisher(WEIGHTS, engines, timeout_s=30) as publisher:
        assert publisher.publish().digests_match
    assert sorted(met) == ["e0", "e1", "e2"]
    for engine in engines:
        engine.stop()


def test_all_engines_are_taken_back_at_once() -> None:
    engines = fleet("staged", "staged", "staged")
    with Publisher(WEIGHTS, engines, timeout_s=30) as publisher:
        publisher.publish()
        met = meet(engines[:2], "rollback")

        def fail(phase: str) -> None:
            if phase == "commit":
                time.sleep(0.3)
                raise RuntimeError("lost its way")

        engines[2].before = fail
        with pytest.raises((RoundFailed, RuntimeError)):
            publisher.publish()
        assert sorted(met) == ["e0", "e1"]
        engines[2].before = lambda phase: None
        assert publisher.publish().digests_match
    for engine in engines:
        engine.stop()
