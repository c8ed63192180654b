"""Shared memory without a name: a sealed memfd that other processes of this user open through /proc.

Load-bearing properties:

- There is no name to leak. The kernel frees the memory with the last process that has it mapped or open, also after kill -9 of
  any of them at any moment.
- It is not limited by the size of /dev/shm, which containers keep at 64 MiB.
- Its size is sealed: a mapping can never reach past the end, so reading it cannot raise SIGBUS.
- The trainer's own mapping is the only one that writes: the memfd is sealed against new writers after the trainer has mapped it, and
  nobody may open it for writing. The reader maps it read-only.
- A forked child gets a mapping of its own at the same addresses: what the child writes stays in the child.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import mmap
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from weightcast.errors import NotShared, PeerLost, TransportError

logger = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_SEAL_FUTURE_WRITE = 0x0010
"""Linux 5.1; Python names it from 3.13 on."""
_READ_ONLY = 0o400

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class ArenaRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How another process finds an arena and recognises the arena. Recognising is needed because numbers of processes and descriptors
    are used again."""

    pid: int
    descriptor: int
    device: int
    inode: int
    nbytes: int


class _Mapped(NamedTuple):
    """A writable mapping of this process that others can read."""

    address: int
    nbytes: int
    descriptor: int


_shared: weakref.WeakKeyDictionary[mmap.mmap, _Mapped] = weakref.WeakKeyDictionary()
"""By the object that unmaps the memory with its last user."""


class Arena:
    """Zeroed shared memory of this process. ``bytes`` stays valid after ``close``, but no reference finds the memory any more."""

    def __init__(self, nbytes: int) -> None:
        _take_care_of_children()
        try:
            descriptor = os.memfd_create("weightcast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                # Reserves the memory now: running out of it later would be a SIGBUS in the middle of a step.
                os.posix_fallocate(descriptor, 0, nbytes)
                mapping = mmap.mmap(descriptor, nbytes)
                os.fchmod(descriptor, _READ_ONLY)
                _seal(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise TransportError(
                f"no {nbytes / 2**20:.0f} MiB of shared memory for the weights: {error}",
                hint="Raise the limits of the trainer (memory, open files), or use another transport",
            ) from None
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._mapping = weakref.ref(mapping)
        self._keep(mapping, descriptor)
        stat = os.fstat(descriptor)
        self.ref = ArenaRef(
            pid=os.getpid(), descriptor=descriptor, device=stat.st_dev, inode=stat.st_ino, nbytes=nbytes
        )
        self._is_open = True

    def _keep(self, mapping: mmap.mmap, descriptor: int) -> None:
        """Keep the descriptor for as long as the memory is used, which may be longer than this object: a child needs it."""
        self._release = weakref.finalize(mapping, os.close, descriptor)
        _shared[mapping] = _Mapped(self.bytes.data_ptr(), self.bytes.numel(), descriptor)

    def close(self) -> None:
        """Close the descriptor. A second call does nothing. The memory is freed with its last user."""
        mapping = self._mapping()
        if not self._is_open or mapping is None or os.getpid() != self.ref.pid:
            return
        self._is_open = False
        # Without a descriptor left to copy to, an old reference still leads to the memory, to be read.
        with contextlib.suppress(OSError):
            copy = fcntl.fcntl(self.ref.descriptor, fcntl.F_DUPFD_CLOEXEC, 0)
            release = self._release
            self._keep(mapping, copy)
            release()


def _seal(descriptor: int) -> None:
    """Nobody resizes the memory, and nobody but who has mapped it already writes to it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS | _SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        logger.warning(
            "this kernel cannot seal shared memory against writing (F_SEAL_FUTURE_WRITE, Linux 5.1): other processes of this user "
            "are kept from the weights by the mode of the memory only"
        )
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


@functools.cache
def _take_care_of_children() -> None:
    """Once in a process, when its first arena is made."""
    _libc()
    os.register_at_fork(after_in_child=_map_privately)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _map_privately() -> None:
    """In a forked child: the same bytes at the same addresses, where a page that the child writes is the child's own."""
    libc, writable = _libc(), mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    for mapped in list(_shared.values()):
        if libc.mmap(mapped.address, mapped.nbytes, writable, flags, mapped.descriptor, 0) != mapped.address:
            # An exception would be lost here. A child that writes ends; the trainer's weights stay what they are.
            libc.mprotect(mapped.address, mapped.nbytes, mmap.PROT_READ)
    _shared.clear()  # what is private stays so in the child's own children, with what the child wrote


def map_arena(ref: ArenaRef) -> torch.Tensor:
    """Map the bytes of another process's arena for reading. torch does not know that the memory is read-only: writing to it is a
    segfault.

    The map is undone with the last view. Raises PeerLost when that process, or its arena, is gone.
    """
    descriptor = _open(ref)
    try:
        mapping = mmap.mmap(descriptor, ref.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise TransportError(f"cannot map the trainer's shared memory: {error}") from None
    finally:
        os.close(descriptor)
    # torch warns about a read-only buffer, so it gets one that does not say so, and that keeps the mapping alive.
    address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    buffer = (ctypes.c_ubyte * ref.nbytes).from_address(address)
    buffer.mapping = mapping  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _open(ref: ArenaRef) -> int:
    try:
        descriptor = os.open(f"/proc/{ref.pid}/fd/{ref.descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotShared(f"cannot open the shared memory of trainer process {ref.pid}: {error.strerror}") from None
        if error.errno == errno.ENOENT or _is_gone(ref.pid):
            raise PeerLost(f"trainer process {ref.pid} is gone, or has released its shared memory") from None
        raise TransportError(
            f"cannot open the shared memory of trainer process {ref.pid}: {error}", hint="Ask for tcp"
        ) from None
    stat = os.fstat(descriptor)
    if (stat.st_dev, stat.st_ino, stat.st_size) != (ref.device, ref.inode, ref.nbytes) or not _is_sealed(descriptor):
        os.close(descriptor)
        raise PeerLost(f"process {ref.pid} no longer has the shared memory it offered")
    return descriptor


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def _is_gone(pid: int) -> bool:
    """True also for a process that was killed and not yet waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")
