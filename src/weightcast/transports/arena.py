"""Shared memory without a name: a sealed memfd that other processes of this user open through /proc.

Load-bearing properties:

- There is no name to leak. The kernel frees the memory with the last process that has it mapped or open, also after kill -9 of
  any of them at any moment.
- It is not limited by the size of /dev/shm, which containers keep at 64 MiB.
- Its size is sealed: a mapping can never reach past the end, so reading it cannot raise SIGBUS.
- The reader maps it read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from pathlib import Path

import msgspec
import numpy as np
import torch

from weightcast.errors import PeerLost, TransportError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ArenaRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How another process finds an arena, and recognises it: process and descriptor numbers are used again."""

    pid: int
    descriptor: int
    device: int
    inode: int
    nbytes: int


class Arena:
    """Zeroed shared memory of this process. ``bytes`` stays valid after ``close``, but nobody new can map it."""

    def __init__(self, nbytes: int) -> None:
        descriptor = os.memfd_create("weightcast", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            # Reserves the memory now: running out of it later would be a SIGBUS in the middle of a step.
            os.posix_fallocate(descriptor, 0, nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(descriptor, nbytes)
        except OSError as error:
            self.close()
            raise TransportError(
                f"no {nbytes / 2**20:.0f} MiB of shared memory for the weights: {error}",
                hint="Raise the memory limit of the trainer, or use another transport",
            ) from None
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        stat = os.fstat(descriptor)
        self.ref = ArenaRef(
            pid=os.getpid(), descriptor=descriptor, device=stat.st_dev, inode=stat.st_ino, nbytes=nbytes
        )

    def close(self) -> None:
        """Idempotent."""
        self._close()


def map_arena(ref: ArenaRef) -> torch.Tensor:
    """The bytes of another process's arena, read-only in spite of what torch believes: writing them is a segfault.

    Unmapped with the last view. Raises PeerLost when that process, or its arena, is gone.
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
        if error.errno == errno.ENOENT or _is_gone(ref.pid):
            raise PeerLost(f"trainer process {ref.pid} is gone, or has released its shared memory") from None
        raise TransportError(
            f"cannot open the shared memory of trainer process {ref.pid}: {error}",
            hint="Trainer and worker must run as one user in one process namespace; else ask for tcp",
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
