"""run_ranks and Peer: values, errors with the rank, and nobody left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from weightcast.errors import DeadlineExceeded
from weightcast.testing.ranks import Peer, RankFailed, run_ranks


def _report(rank: int, world_size: int, token: str) -> tuple[int, int, str, str, str]:
    return rank, world_size, token, os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]


def _raise_on_one(rank: int, world_size: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise LookupError(f"no luck on {rank}")
    time.sleep(60)


def _kill_self(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _write_pid_and_sleep(rank: int, world_size: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_values_come_back_in_order_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    token = os.urandom(8).hex()
    assert run_ranks(_report, 2, token) == [(0, 2, token, "1", "PASSIVE"), (1, 2, token, "1", "PASSIVE")]
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_exception_is_raised_with_its_rank_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="no luck on 1") as caught:
        run_ranks(_raise_on_one, 2, str(tmp_path))
    assert (caught.value.rank, caught.value.kind) == (1, "LookupError")
    assert not any(_is_running(int(path.read_text())) for path in tmp_path.iterdir())


def test_a_killed_rank_is_reported_as_killed() -> None:
    with pytest.raises(RankFailed, match="SIGKILL") as caught:
        run_ranks(_kill_self, 2)
    assert (caught.value.rank, caught.value.kind) == (0, "SIGKILL")


def test_ranks_that_do_not_end_are_killed_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match=r"\[0, 1\]"):
        run_ranks(_write_pid_and_sleep, 2, str(tmp_path), timeout_s=4.0)
    assert not any(_is_running(int(path.read_text())) for path in tmp_path.iterdir())


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def fail(self) -> None:
        raise ValueError("as asked")


def test_a_peer_keeps_its_object_through_errors_until_it_is_killed() -> None:
    with Peer(_Counter, rank=3) as peer:
        assert peer.call("add", 2) == 2
        with pytest.raises(RankFailed, match="as asked") as caught:
            peer.call("fail")
        assert (caught.value.rank, caught.value.kind) == (3, "ValueError")
        assert peer.call("add", 5) == 7
        peer.start("add", 1)
        peer.kill()
        assert not _is_running(peer.pid)
