"""Taking memory: workers of one host look for room and fill it one after the other, so that each counts what the others took.

A lock of the file system holds the others off, in a folder that belongs to this user. The kernel lets go of a lock when its
process ends, however that ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from weightcast.deadline import Deadline
from weightcast.transports.facts import gpu_uuid

logger = logging.getLogger(__name__)

STEP_S = 0.02


@contextmanager
def taking_memory(device: torch.device, deadline: Deadline) -> Iterator[None]:
    """While inside, no other worker of this host and user looks for room, on the device or in the host's memory.

    DeadlineExceeded when the other workers do not come to an end. One thread must not enter twice.
    """
    # Always in this order, so that two workers never wait for each other. Weights on a GPU may be staged in the host's memory.
    names = ["host", f"gpu-{gpu_uuid(device)}"] if device.type == "cuda" else ["host"]
    with ExitStack() as stack:
        folder = _folder()
        if folder is None:
            logger.warning("there is no folder for locks: workers that join at once may take more memory than there is")
        for name in names if folder is not None else ():
            assert folder is not None
            stack.enter_context(_locked(folder / f"{name}.lock", deadline))
        yield


@contextmanager
def _locked(path: Path, deadline: Deadline) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                deadline.check("waiting for other workers of this host that take memory")
                time.sleep(STEP_S)
        yield
    finally:
        os.close(descriptor)


def _folder() -> Path | None:
    """A folder of this user's that all of its processes find, whatever their environment; None where there can be none.

    What somebody else made under that name is not used: its owner could hold the locks for ever.
    """
    user = os.geteuid()
    for parent in (Path(f"/run/user/{user}"), Path("/tmp")):
        folder = parent / f"weightcast-{user}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            return folder
    return None
