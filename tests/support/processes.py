"""Child: an object in a process of its own that can be killed, stopped and continued, and that others can call meanwhile.

Children come from the fork server of testing.ranks, so they start in a fraction of a second. Calls carry numbers: an answer that
comes after its caller gave up is thrown away and not taken for the next one's.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded
from weightcast.testing import ranks

PRELOAD = ("tests.support.engine_process", "tests.support.trainer_process")


def start_fork_server(*modules: str) -> None:
    """Start the server that children are forked from, with more modules imported; nothing when it runs already."""
    ranks.start_fork_server(*PRELOAD, *modules)


def be_a_host_for_nccl() -> None:
    """Have NCCL take this process for a host of its own: it refuses two ranks on one GPU of one host."""
    os.environ["NCCL_HOSTID"] = f"weightcast-{os.getpid()}"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # NCCL's own monitoring keeps a connection to every process it ever met, for as long as this one lives.
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")


class ChildFailed(RuntimeError):
    """A call raised in the child, or the child is gone. ``kind`` is the name of the exception's class, or "gone"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Child:
    """Runs ``factory(*args)`` in a process and calls methods of what it returns, one at a time, by name.

    ``factory`` is a module-level class or function. Leaving the context kills the process, whatever it is doing.
    """

    def __init__(self, factory: Callable[..., Any], *args: Any, netns: str | None = None) -> None:
        start_fork_server()
        context = get_context("forkserver")
        self._channel, theirs = context.Pipe()
        self._numbers = itertools.count(1)
        self._process = context.Process(target=_serve, args=(theirs, netns, factory, args), daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def start(self, method: str, *args: Any) -> int:
        """Call a method and do not wait; ``result`` of the number gives what it returns."""
        number = next(self._numbers)
        try:
            self._channel.send((number, method, args))
        except OSError as error:
            raise ChildFailed("gone", f"process {self.pid}: {error}") from None
        return number

    def result(self, number: int, timeout_s: float = 30.0) -> Any:
        """The value of a started call; ChildFailed when it raised or the process died."""
        deadline = Deadline(timeout_s)
        while True:
            if not self._channel.poll(deadline.remaining_s()):
                raise DeadlineExceeded(f"process {self.pid} did not answer within {timeout_s:g} s")
            try:
                answered, ok, value = self._channel.recv()
            except (EOFError, OSError) as error:
                raise ChildFailed("gone", f"process {self.pid}: {error or 'ended'}") from None
            if answered == number:
                if ok:
                    return value
                raise ChildFailed(*value)

    def call(self, method: str, *args: Any, timeout_s: float = 30.0) -> Any:
        """Call a method and wait for its value."""
        return self.result(self.start(method, *args), timeout_s)

    def stop(self) -> None:
        """Stop the process where it is, as a machine that hangs would (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Continue a stopped process."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        self._process.kill()
        self._process.join()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ends(self, timeout_s: float = 10.0) -> bool:
        """Whether the process ends within a time. One that was killed may take a while to: a GPU has to let go of it."""
        self._process.join(timeout_s)
        return not self.alive

    def close(self) -> None:
        """Kill it, if it still runs, and free everything; idempotent."""
        with contextlib.suppress(ValueError):  # closed already
            self.kill()
            self._process.close()
        self._channel.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _serve(channel: Connection, netns: str | None, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The child's main thread. Catches everything: the other side decides what it means."""
    import torch

    from tests.support.network import enter

    gc.freeze()  # nothing that the server imported is garbage, and looking at it would copy its pages
    be_a_host_for_nccl()
    if netns is not None:
        enter(netns)
    torch.set_num_threads(1)
    threading.current_thread().name = "child"
    try:
        subject = factory(*args)
    except Exception as error:
        failure = (type(error).__name__, f"{error}\n{traceback.format_exc()}")
        while True:
            try:
                channel.send((channel.recv()[0], False, failure))
            except (EOFError, OSError):
                return
    while True:
        try:
            number, method, arguments = channel.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[int, bool, Any] = (number, True, getattr(subject, method)(*arguments))
        except Exception as error:
            answer = (number, False, (type(error).__name__, f"{error}\n{traceback.format_exc()}"))
        with contextlib.suppress(OSError):
            channel.send(answer)
