"""Turns: who may call a Publisher: one thread at a time, in the process that made it, until the Publisher is closed."""

from __future__ import annotations

import _thread
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from weightcast.deadline import Deadline
from weightcast.errors import StateError, TransportError, WeightcastError

CALLED_OFF_S = 5.0
"""How long a call that was called off may take to its end: it takes its round back."""


CLOSED_HINT = "Make a new Publisher"


class Finish(Protocol):
    """What is left to do when no call is let in any more. ``settled``: none runs."""

    def __call__(self, *, settled: bool) -> None: ...


class Turns:
    """Lets in one call at a time. A call that comes meanwhile, or in a forked child, is a StateError at once: sockets and engines
    belong to the call that runs and to the process that opened them."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._runs = ""
        self._thread: int | None = None
        """The thread of the call that runs, and by when that call ends."""
        self._deadline: Deadline | None = None
        self._finish: Finish | None = None
        self._owed: list[Finish] = []
        """What the call that runs does when it is over. Taken out by one ``pop``, so that it is done once."""

    @property
    def is_child(self) -> bool:
        """Whether this process was forked from the one that made the Publisher."""
        return os.getpid() != self._pid

    @property
    def are_over(self) -> bool:
        """Whether ``end`` was called."""
        return self._finish is not None

    def call_off_by(self, deadline: Deadline) -> None:
        """Have ``end`` cancel the deadline of the call that runs now, also when it came at the same moment."""
        self._deadline = deadline
        if self.are_over:
            deadline.cancel()

    def end(self, finish: Finish, *, waits: bool = True) -> None:
        """Let in no call any more, call off the one that runs, and ``finish`` when it is over, or is not in ``CALLED_OFF_S``. A second
        time does nothing, and so does a forked child.

        Inside a call, as in a signal's handler, this returns at once, and the call finishes on its way out: what was interrupted may
        hold any lock. The same where ``waits`` is False: the call that runs needs this thread.
        """
        if self.are_over:
            return
        self._finish = finish
        if self.is_child:
            return
        if self._thread == threading.get_ident():
            self._owed.append(finish)
            if self._deadline is not None:
                _thread.start_new_thread(self._deadline.cancel, ())
            return
        if self._deadline is not None:
            self._deadline.cancel()
        if not waits:
            self._owed.append(finish)
            if self._lock.acquire(blocking=False):  # no call runs, or it is over
                self._lock.release()
                self._pay()
            return
        is_over = False
        try:
            is_over = self._lock.acquire(timeout=CALLED_OFF_S)
        finally:
            if is_over:
                self._lock.release()
            finish(settled=is_over)

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Run the call ``what`` inside the block, which is ``undisturbed``."""
        if self.is_child:
            raise StateError(
                f"{what}() in process {os.getpid()}, which was forked from process {self._pid} that made this Publisher",
                hint=f"Call it in process {self._pid}; a Publisher of this process's own needs engines of its own, or takeover=True",
            )
        if self.are_over:
            raise StateError("the publisher is closed", hint=CLOSED_HINT)
        if not self._lock.acquire(blocking=False):
            raise StateError(
                f"{what}() was called while {self._runs}",
                hint="A Publisher takes one call at a time: make all of them from one thread, or hold a lock of your own around each",
            )
        try:
            self._runs = f"{what}() runs in thread {threading.current_thread().name!r}"
            self._thread = threading.get_ident()
            with undisturbed(), self._told_apart(what):
                yield
        finally:
            self._thread = self._deadline = None
            self._lock.release()
            self._pay()

    def _pay(self) -> None:
        """Do what is owed, once no call runs."""
        try:
            finish = self._owed.pop()
        except IndexError:
            return
        finish(settled=True)

    @contextmanager
    def _told_apart(self, what: str) -> Iterator[None]:
        """What a call stumbles over because its Publisher was closed meanwhile is a StateError."""
        try:
            yield
        except WeightcastError as error:
            error.hint = CLOSED_HINT if self.are_over else error.hint
            raise
        except Exception as error:
            if not self.are_over:
                raise
            raise StateError(f"{what}() was called off: the publisher was closed", hint=CLOSED_HINT) from error


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
