"""At exit: threads that work in torch are ended before Python is. A thread that comes back from C++ to a Python that is gone ends the
process by an abort, whatever its exit code was to be."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable


def at_exit(end: Callable[[], object]) -> Callable[[], None]:
    """Have ``end`` called when this process ends in order, and not in a process forked from it. Returns what calls that off."""
    pid = os.getpid()

    def here() -> None:
        if os.getpid() == pid:
            end()

    atexit.register(here)
    return lambda: atexit.unregister(here)
