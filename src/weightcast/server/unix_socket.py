"""A unix socket to serve on: its file's permissions decide who may call. Linux.

Nothing is followed or replaced at the path but a socket that nobody listens on, and the file has mode 0600 from the moment it exists. A
server that is still loading its model does not listen yet, so a lock beside the socket, and not the socket alone, says whether the
path is taken. The kernel lets go of the lock however its process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.unix_urls import MAX_PATH_NBYTES


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet, for this user alone. Its file is removed when the context ends. Before other threads.

    Raises InvalidInput where something stands at ``path`` that is not a socket left behind by a server that ended.
    """
    where = path.absolute()
    if len(os.fsencode(where)) > MAX_PATH_NBYTES:
        raise _refused(where, f"the path has more than {MAX_PATH_NBYTES} bytes")
    with _lock(where), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _clear(where)
        _bind(sock, where)
        made = os.lstat(where)
        try:
            yield sock
        finally:
            _remove(where, made)


def _refused(where: Path, why: str) -> InvalidInput:
    return InvalidInput(f"cannot serve on {where}: {why}", field="unix_socket", hint="Give another path")


@contextlib.contextmanager
def _lock(where: Path) -> Iterator[None]:
    """Hold the lock of a socket's path. Its file is removed at the end, by its holder, so one that was removed meanwhile does not count."""
    path = where.with_name(f".{where.name}.lock")
    while True:
        lock = _open_lock(where, path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise _refused(where, "another server has it") from None
        if _stands(path, os.fstat(lock)):
            break
        os.close(lock)
    try:
        yield
    finally:
        _remove(path, os.fstat(lock))
        os.close(lock)


def _open_lock(where: Path, path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        lock = os.open(path, flags, 0o600)
    except OSError as error:
        raise _refused(where, f"{path}: {error.strerror}") from None
    found = os.fstat(lock)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size:
        os.close(lock)
        raise _refused(where, f"{path} is no lock of this user's")
    return lock


def _clear(where: Path) -> None:
    """Remove a socket that nobody listens on; refuse anything else that stands there."""
    try:
        found = os.lstat(where)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _refused(where, str(error.strerror)) from None
    if not stat.S_ISSOCK(found.st_mode):
        raise _refused(where, "what stands there is no socket, and is left as it is")
    code = _knock(where)
    if code in (0, errno.EAGAIN):
        raise _refused(where, "another process listens there")
    if code != errno.ECONNREFUSED:
        raise _refused(where, os.strerror(code))
    try:
        where.unlink()
    except OSError as error:
        raise _refused(
            where, f"the socket that stands there is used by nobody, and cannot be removed: {error.strerror}"
        ) from None


def _knock(where: Path) -> int:
    """What connecting to a socket says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(where))


def _bind(sock: socket.socket, where: Path) -> None:
    """Permissions that were set afterwards would come too late."""
    mask = os.umask(0o177)
    try:
        sock.bind(str(where))
    except OSError as error:
        raise _refused(where, str(error.strerror)) from None
    finally:
        os.umask(mask)


def _stands(path: Path, made: os.stat_result) -> bool:
    """Whether a file still has its name."""
    try:
        return os.path.samestat(os.lstat(path), made)
    except OSError:
        return False


def _remove(path: Path, made: os.stat_result) -> None:
    """Remove a file, but none that took its place."""
    if _stands(path, made):
        with contextlib.suppress(OSError):
            path.unlink()
