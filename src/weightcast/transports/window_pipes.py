"""Two pipes between the processes of a pair on one host, which say what windows of a stream are filled, and what windows are read.

Load-bearing properties:

- A window is told by one system call, and the other side wakes by it. A message of the control channel passes four threads, which costs as
  much time as some megabytes of the stream.
- The pipes have no name. The trainer makes both; the worker opens its ends through /proc, as it does shared memory, so only processes of
  the same user can.
- A pipe says nothing of a process that is gone, since the trainer holds all four ends. Whoever waits looks for that in ``check``.
- What is told is a number of a round and of a window. What an earlier round left in a pipe changes nothing.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
from collections.abc import Callable

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import NotShared, PeerLost, TransportError

LOOK_S = 0.1
"""How often a wait looks whether it still has a purpose."""
_TOLD = struct.Struct("=QQ")
"""Round and window. Pipes are of one host, and keep what is written at once together."""
_MOST = 256 * _TOLD.size


class PipesRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the worker finds the ends that it reads and writes, and recognises them: numbers of processes and descriptors are used again."""

    pid: int
    reads: int
    writes: int
    inodes: tuple[int, int]


class WindowPipes:
    """One side's ends. One thread tells and one thread waits at a time. Windows are told in ascending order within a round."""

    def __init__(self, reads: int, writes: int, others: tuple[int, ...] = ()) -> None:
        """``others``: descriptors that are closed with these ends."""
        self._reads, self._writes, self._all = reads, writes, (reads, writes, *others)
        self._poll = select.poll()
        self._poll.register(reads, select.POLLIN)
        self._last = (0, -1)
        """The round and the window that the other side told last."""

    @classmethod
    def make(cls) -> tuple[WindowPipes, PipesRef]:
        """The trainer's side, and what the worker's side is opened by."""
        descriptors: list[int] = []
        try:
            for _ in range(2):
                descriptors += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise TransportError(
                f"no pipe to a worker: {error}", hint="Raise the limit of open files of the trainer (ulimit -n)"
            ) from None
        filled_out, filled_in, read_out, read_in = descriptors
        inodes = (os.fstat(filled_out).st_ino, os.fstat(read_in).st_ino)
        ref = PipesRef(pid=os.getpid(), reads=filled_out, writes=read_in, inodes=inodes)
        return cls(read_out, filled_in, (filled_out, read_in)), ref

    @classmethod
    def open(cls, ref: PipesRef) -> WindowPipes:
        """The worker's side. Raises PeerLost when the trainer, or its pipes, are gone."""
        reads = _opened(ref.pid, ref.reads, os.O_RDONLY, ref.inodes[0])
        try:
            return cls(reads, _opened(ref.pid, ref.writes, os.O_WRONLY, ref.inodes[1]))
        except BaseException:
            os.close(reads)
            raise

    def tell(self, round: int, window: int) -> None:
        """Tell the other side of a window. Returns at once."""
        try:
            os.write(self._writes, _TOLD.pack(round, window))
        except OSError as error:
            raise TransportError(f"the other side hears nothing of windows: {error}") from None

    def wait(self, round: int, window: int, deadline: Deadline, check: Callable[[], None]) -> None:
        """Return when the other side has told of this window, or of a later one of the round. ``check`` is called while waiting, and may
        raise to end the wait."""
        while self._last < (round, window):
            if not self._poll.poll(0):
                check()
                deadline.check("waiting for a window of the stream")
                self._poll.poll(1000 * min(LOOK_S, deadline.remaining_s()) + 1)
            self._hear()

    def _hear(self) -> None:
        try:
            data = os.read(self._reads, _MOST)
        except BlockingIOError:
            return
        if not data:
            raise PeerLost("the other side is gone: nobody has its end of the pipe")
        if len(data) % _TOLD.size:
            raise TransportError("what the other side tells of windows is cut off")
        self._last = max(self._last, *_TOLD.iter_unpack(data))

    def close(self) -> None:
        """Idempotent."""
        descriptors, self._all = self._all, ()
        for descriptor in descriptors:
            os.close(descriptor)


def _opened(pid: int, descriptor: int, access: int, inode: int) -> int:
    try:
        found = os.open(f"/proc/{pid}/fd/{descriptor}", access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotShared(f"cannot open a pipe of trainer process {pid}: {error.strerror}") from None
        raise PeerLost(f"trainer process {pid} is gone, or has closed its pipes: {error}") from None
    status = os.fstat(found)
    if not stat.S_ISFIFO(status.st_mode) or status.st_ino != inode:
        os.close(found)
        raise PeerLost(f"process {pid} no longer has the pipe it offered")
    return found
