"""Run ranks as processes. Their values come back, their exceptions are raised here with the rank, and no rank outlives the call.

Each child has one OpenMP thread, which sleeps while it waits, because many ranks share few cores. Children are forked from a server that
has imported torch, with the environment of their caller. On a machine with a GPU children are spawned: a module that the server imports
may ask for the GPU, and then no child of the server could use the GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from types import TracebackType
from typing import Any

import torch

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded

PRELOAD: list[str] = []
"""What the fork server of this process imports beside torch. A suite with many ranks appends what they need before the first starts."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_environment_lock = threading.Lock()


class RankFailed(RuntimeError):
    """A rank raised or died. ``kind`` is the name of its exception's class, or the signal that ended it."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(f"rank {rank} failed with {kind}: {text}")
        self.rank = rank
        self.kind = kind


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 100.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` in ``world_size`` processes, and return their values in order of rank.

    ``fn`` is a module-level function. The first failure ends all ranks and is raised as RankFailed. A rank that still runs after
    ``timeout_s`` is DeadlineExceeded.
    """
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_Process(rank, _run_once, fn, world_size, args)) for rank in range(world_size)]
        # The first ones wait until the server that forks them has imported everything, which is not theirs to answer for.
        deadline = Deadline(timeout_s)
        waiting = {process.channel: process for process in ranks}
        values: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), deadline.remaining_s())
            if not ready:
                silent = sorted(process.rank for process in waiting.values())
                raise DeadlineExceeded(f"ranks {silent} did not end within {timeout_s:g} s")
            for channel in ready:
                assert isinstance(channel, Connection)
                process = waiting.pop(channel)
                values[process.rank] = process.receive(deadline)
        return [values[rank] for rank in range(world_size)]


class Peer:
    """An object in a process of its own. The object's methods are called by name, one at a time.

    ``factory`` is a module-level class or function without arguments that makes the object. Use a Peer as a context manager: leaving the
    context kills the process, whatever the process does.
    """

    def __init__(self, factory: Callable[[], Any], rank: int = 1) -> None:
        self._process = _Process(rank, _serve, factory)
        self.pid = self._process.pid

    def start(self, method: str, *args: Any) -> None:
        """Call a method without waiting. ``result`` returns the method's value."""
        self._process.channel.send((method, args))

    def result(self, timeout_s: float = 30.0) -> Any:
        """Return the value of the last call. RankFailed when the call raised or the process died."""
        return self._process.receive(Deadline(timeout_s))

    def call(self, method: str, *args: Any, timeout_s: float = 30.0) -> Any:
        """Call a method and wait for its value."""
        self.start(method, *args)
        return self.result(timeout_s)

    def freeze(self) -> None:
        """Stop the process with SIGSTOP, as if its machine hung."""
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End the process with SIGKILL and wait until the process is gone."""
        self._process.end()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.close()


class _Process:
    """One spawned child and the pipe to it."""

    def __init__(self, rank: int, target: Callable[..., None], *args: Any) -> None:
        self.rank = rank
        context = _start_context()
        self.channel, theirs = context.Pipe()
        environment = {**os.environ, **_ENVIRONMENT}
        self._process = context.Process(
            target=_with_environment, args=(environment, target, theirs, rank, *args), daemon=True
        )
        try:
            with _child_environment():
                self._process.start()
        except BaseException:
            self.channel.close()
            raise
        finally:
            theirs.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def receive(self, deadline: Deadline) -> Any:
        if not self.channel.poll(deadline.remaining_s()):
            raise DeadlineExceeded(f"rank {self.rank} did not answer within {deadline.timeout_s:g} s")
        try:
            ok, value = self.channel.recv()
        except (EOFError, ConnectionResetError):
            raise RankFailed(self.rank, *self._cause_of_death()) from None
        if not ok:
            raise RankFailed(self.rank, *value)
        return value

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self.end()
        self._process.close()
        self.channel.close()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _cause_of_death(self) -> tuple[str, str]:
        self._process.join(5.0)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return name, f"the process was ended by {name}"
        return "exit", f"the process ended with status {code} before it answered"


def start_fork_server(*modules: str) -> None:
    """Start the server that children are forked from, with more modules imported; nothing when it runs already."""
    wanted = dict.fromkeys(["weightcast.testing.ranks", *PRELOAD, *modules])
    get_context("forkserver").set_forkserver_preload(list(wanted))
    with _child_environment():
        forkserver.ensure_running()


@contextlib.contextmanager
def _child_environment() -> Iterator[None]:
    """A child reads OpenMP's variables when torch is first loaded, which is before anything of ours runs there."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _start_context() -> SpawnContext | ForkServerContext:
    if torch.cuda.is_available():
        return get_context("spawn")
    start_fork_server()
    return get_context("forkserver")


def _with_environment(environment: dict[str, str], target: Callable[..., None], *args: Any) -> None:
    """A forked child has the environment of its server until here, and all that the server imported on its hands."""
    gc.freeze()  # nothing of that is garbage, and looking at it would copy its pages
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _run_once(channel: Connection, rank: int, fn: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> None:
    _answer(channel, partial(fn, rank, world_size, *args))


def _serve(channel: Connection, rank: int, factory: Callable[[], Any]) -> None:
    subject = factory()
    while True:
        try:
            method, args = channel.recv()
        except EOFError:
            return
        _answer(channel, partial(getattr(subject, method), *args))


def _answer(channel: Connection, call: Callable[[], Any]) -> None:
    """Send what a call returns or raises. Catches everything: the other side decides what it means."""
    try:
        answer: tuple[bool, Any] = (True, call())
    except Exception as error:  # noqa: BLE001
        answer = (False, (type(error).__name__, f"{error}\n{traceback.format_exc()}"))
    channel.send(answer)
