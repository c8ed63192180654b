"""Together: steps that several threads have to take at the same time, one for each worker of a group, and that one of them does.

The last thread that comes does the work for all; the others wait for its result. When it fails, or one of the waiting gives
up, nobody waits any longer, and the group is done for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, GroupBroken, WeightcastError

_STEP_S = 0.1
GRACE_S = 0.9
"""How long members wait beyond their deadline for work that runs: it ends by its own, and knows whose fault that is."""


class Blamed(Exception):
    """Raised by the work to say which member caused the failure. That member's thread raises ``error``."""

    def __init__(self, member: int, error: WeightcastError) -> None:
        super().__init__(str(error))
        self.member, self.error = member, error


class Together:
    """The meeting of ``size`` threads. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._waiting: set[int] = set()
        self._generation = 0
        self._working = False
        self._failure: BaseException | None = None
        self._blamed: int | None = None

    @property
    def failure(self) -> BaseException | None:
        """Why the group has failed; None while it has not."""
        return self._failure

    def fail(self, error: BaseException, blamed: int | None = None) -> None:
        """End all waits, present and later ones. The first failure is kept."""
        with self._changed:
            if self._failure is None:
                self._failure, self._blamed = error, blamed
            self._changed.notify_all()

    def do(
        self, member: int, what: str, deadline: Deadline, work: Callable[[], None], check: Callable[[], None]
    ) -> None:
        """Return when all members have come here and one of them has done ``work``. ``check`` is called while waiting, and may raise.

        Everybody raises a failure. The member that caused the failure raises the error as it is, or, where no member caused it, the
        member that did the work. The others raise GroupBroken. A DeadlineExceeded that no member caused is raised as it is by all.
        """
        with self._changed:
            self._refuse(member)
            self._waiting.add(member)
            is_last = len(self._waiting) == self._size
            generation = self._generation
            if is_last:
                self._waiting.clear()
                self._working = True
        try:
            if is_last:
                work()
            else:
                self._wait(member, what, deadline, generation, check)
        except Blamed as blamed:
            self.fail(blamed.error, blamed.member)
            self._refuse(member)
        except BaseException as error:
            self.fail(error, None if is_last or isinstance(error, DeadlineExceeded) else member)
            raise
        if is_last:
            with self._changed:
                self._generation += 1
                self._working = False
                self._changed.notify_all()

    def _wait(self, member: int, what: str, deadline: Deadline, generation: int, check: Callable[[], None]) -> None:
        with self._changed:
            while self._generation == generation:
                self._refuse(member)
                check()
                if not self._working or deadline.cancelled or deadline.at + GRACE_S < time.monotonic():
                    deadline.check(f"{what}: waiting for the other workers of the group")
                self._changed.wait(min(_STEP_S, deadline.limit_s()))

    def _refuse(self, member: int) -> None:
        failure = self._failure
        if failure is None:
            return
        if self._blamed == member and isinstance(failure, WeightcastError):
            raise failure
        if isinstance(failure, DeadlineExceeded) and self._blamed is None:
            raise DeadlineExceeded(failure.message)
        raise GroupBroken(f"the transfer shared with other workers broke: {failure}") from failure
