"""Turns: who may call a Publisher: one thread at a time, in the process that made it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weightcast.errors import StateError, TransportError


class Turns:
    """Lets in one call at a time. A call that comes meanwhile, or in a forked child, is a StateError at once: sockets and engines
    belong to the call that runs and to the process that opened them."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._runs = ""

    @property
    def is_child(self) -> bool:
        """Whether this process was forked from the one that made the Publisher."""
        return os.getpid() != self._pid

    @property
    def is_taken(self) -> bool:
        """Whether a call runs."""
        return self._lock.locked()

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Run the call ``what`` inside the block, which is ``undisturbed``."""
        if self.is_child:
            raise StateError(
                f"{what}() in process {os.getpid()}, which was forked from process {self._pid} that made this Publisher",
                hint=f"Call it in process {self._pid}; a Publisher of this process's own needs engines of its own, or takeover=True",
            )
        if not self._lock.acquire(blocking=False):
            raise StateError(
                f"{what}() was called while {self._runs}",
                hint="A Publisher takes one call at a time: make all of them from one thread, or hold a lock of your own around each",
            )
        try:
            self._runs = f"{what}() runs in thread {threading.current_thread().name!r}"
            with undisturbed():
                yield
        finally:
            self._lock.release()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a call outside of the caller's inference mode, in which tensors are made that cannot be trained, and turn the operating
    system's refusal of one more descriptor, from whatever library, into a TransportError."""
    try:
        with torch.inference_mode(False):
            yield
    except Exception as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise TransportError(
                f"this process may open no more files and sockets: {error}",
                hint="Raise the limit (ulimit -n), or close what is open, then call again",
            ) from error
        raise
