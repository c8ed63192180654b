"""Window pipes: what one process tells of windows the other one hears, and nothing of another round, process or user."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, NotShared, PeerLost, StateError
from weightcast.transports.window_pipes import PipesRef, WindowPipes

TIMEOUT_S = 120.0


def nothing() -> None:
    pass


def over() -> None:
    raise StateError("the round is over")


@pytest.fixture
def made() -> Iterator[tuple[WindowPipes, PipesRef]]:
    pipes, ref = WindowPipes.make()
    yield pipes, ref
    pipes.close()


def num_open(ref: PipesRef) -> int:
    """How many descriptors of this process are ends of the pipes."""
    pipes = {f"pipe:[{inode}]" for inode in ref.inodes}
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(descriptor) in pipes
    return found


def answering(ref: PipesRef, windows: int) -> None:
    """A worker: says of each window of round 2 that it is read, once it is filled."""
    pipes = WindowPipes.open(ref)
    for window in range(windows):
        pipes.wait(2, window, Deadline(TIMEOUT_S), nothing)
        pipes.tell(2, window)
    pipes.close()


def test_windows_are_told_from_process_to_process_and_back(made: tuple[WindowPipes, PipesRef]) -> None:
    pipes, ref = made
    worker = multiprocessing.get_context("fork").Process(target=answering, args=(ref, 500))
    worker.start()
    for window in range(500):
        pipes.tell(2, window)
        if window >= 4:
            pipes.wait(2, window - 4, Deadline(TIMEOUT_S), nothing)
    pipes.wait(2, 499, Deadline(TIMEOUT_S), nothing)
    worker.join(TIMEOUT_S)
    assert worker.exitcode == 0


def test_windows_of_an_earlier_round_count_for_nothing(made: tuple[WindowPipes, PipesRef]) -> None:
    pipes, ref = made
    worker = WindowPipes.open(ref)
    for window in range(3):
        pipes.tell(1, window)
    with pytest.raises(StateError, match="over"):
        worker.wait(2, 0, Deadline(TIMEOUT_S), over)
    pipes.tell(2, 0)
    worker.wait(2, 0, Deadline(TIMEOUT_S), nothing)
    with pytest.raises(StateError, match="over"):
        worker.wait(2, 1, Deadline(TIMEOUT_S), over)
    worker.close()


def test_a_wait_ends_by_its_deadline_and_by_what_its_check_raises(made: tuple[WindowPipes, PipesRef]) -> None:
    pipes, _ = made
    with pytest.raises(DeadlineExceeded, match="a window of the stream"):
        pipes.wait(1, 0, Deadline(0.15), nothing)
    is_over = threading.Event()

    def check() -> None:
        if is_over.is_set():
            over()
        is_over.set()

    with pytest.raises(StateError, match="over"):
        pipes.wait(1, 0, Deadline(TIMEOUT_S), check)


def test_a_trainer_that_is_gone_is_named(made: tuple[WindowPipes, PipesRef]) -> None:
    pipes, ref = made
    worker = WindowPipes.open(ref)
    pipes.close()
    with pytest.raises(PeerLost, match="nobody has its end"):
        worker.wait(1, 0, Deadline(TIMEOUT_S), nothing)
    worker.close()
    with pytest.raises(PeerLost, match="is gone, or has closed"):
        WindowPipes.open(ref)


def test_other_descriptors_of_that_number_are_not_taken(made: tuple[WindowPipes, PipesRef]) -> None:
    _, ref = made
    other, beside = os.pipe()
    file = os.open(__file__, os.O_RDONLY)
    for wrong in (
        msgspec.structs.replace(ref, reads=other),
        msgspec.structs.replace(ref, reads=file),
        msgspec.structs.replace(ref, inodes=(ref.inodes[0], ref.inodes[0])),
    ):
        before = num_open(wrong)
        with pytest.raises(PeerLost, match="no longer has the pipe"):
            WindowPipes.open(wrong)
        assert num_open(wrong) == before
    for descriptor in (other, beside, file):
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_cannot_open_the_pipes(made: tuple[WindowPipes, PipesRef]) -> None:
    _, ref = made
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def nobody(channel: Connection) -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            WindowPipes.open(ref)
        except NotShared as error:
            channel.send(error.message)

    process = context.Process(target=nobody, args=(there,))
    process.start()
    assert here.poll(TIMEOUT_S)
    assert "cannot open a pipe of trainer process" in here.recv()
    process.join(TIMEOUT_S)


def test_closing_gives_back_every_descriptor() -> None:
    pipes, ref = WindowPipes.make()
    worker = WindowPipes.open(ref)
    assert num_open(ref) == 6
    for _ in range(2):
        worker.close()
        pipes.close()
    assert num_open(ref) == 0
