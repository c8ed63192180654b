"""Publishing: a round that goes on beside the trainer, as ``publish(wait=False)`` returns it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from weightcast.at_exit import at_exit
from weightcast.cuda.wait import own_stream
from weightcast.deadline import Deadline, result_within
from weightcast.errors import DeadlineExceeded, StateError
from weightcast.report.model import Report
from weightcast.trainer.turns import undisturbed

logger = logging.getLogger(__name__)


class Publishing:
    """A round whose values were taken when ``publish`` was called. ``wait`` returns the round's report or raises its error.

    The round ends by its own deadline, whether somebody waits or not. An error is logged, too, as it may be that nobody waits.
    """

    def __init__(
        self,
        run: Callable[[], Report],
        deadline: Deadline,
        device: torch.device,
        held_s: float,
        check_caller: Callable[[], None] = lambda: None,
    ) -> None:
        """``check_caller`` raises StateError on a thread that the round needs."""
        self._deadline, self._device, self._held_s = deadline, device, held_s
        self._check_caller = check_caller
        self._result: Future[Report] = Future()
        self._thread = threading.Thread(target=self._run, args=(run,), name="weightcast-publishing", daemon=True)
        self._forget = at_exit(self._end)

    def start(self) -> None:
        """Begin the round. What interrupts this calls the round off: nobody has this object then."""
        try:
            self._thread.start()
        except BaseException:
            self.cancel()
            given_up = Deadline(_START_S)
            while not self._is_started and not given_up.passed:  # the thread may be on its way
                time.sleep(0.001)
            raise

    @property
    def _is_started(self) -> bool:
        return self._thread.ident is not None

    def _run(self, run: Callable[[], Report]) -> None:
        try:
            with undisturbed(), own_stream(self._device):
                report = run()
        except BaseException as caught:  # noqa: BLE001 - whatever it is, it belongs to who waits
            error = caught
            if (
                isinstance(caught, RuntimeError) and not threading.main_thread().is_alive()
            ):  # Python begins no thread any more
                error = StateError("the program ended before the round", hint="Call wait() of what publish() returned")
            logger.warning("the round beside the trainer failed: %s", str(error))
            self._result.set_exception(error)
        else:
            self._result.set_result(report)

    @property
    def held_s(self) -> float:
        """How long the call of ``publish`` held up the trainer, in seconds."""
        return self._held_s

    @property
    def done(self) -> bool:
        """Whether the round is over, whatever came of it."""
        return self._result.done()

    def wait(self, timeout_s: float | None = None) -> Report:
        """Return the report of the round, or raise its error: that of ``publish``, every time.

        Raises DeadlineExceeded when the round is not over after ``timeout_s`` seconds; the round goes on. None: as long as the round may
        take. On the event loop that an engine runs on, StateError before the round is over: it needs the loop.
        """
        self._refuse_to_hold_up()
        deadline = Deadline(_GRACE_S + self._deadline.limit_s() if timeout_s is None else timeout_s)
        return result_within(self._result, deadline, lambda: self._late(deadline))

    def settle(self, deadline: Deadline) -> None:
        """Return when the round is over and its thread has ended; DeadlineExceeded where that takes longer."""
        self._refuse_to_hold_up()
        if self._is_started and threading.current_thread() is not self._thread:
            self._thread.join(deadline.limit_s())
            if self._thread.is_alive():
                raise self._late(deadline)
        self._forget()

    def when_over(self, call: Callable[[], object]) -> None:
        """Have the round's thread make a call when the round is over; this thread, where it is over already."""
        self._result.add_done_callback(lambda _: call())

    def _refuse_to_hold_up(self) -> None:
        if self.done:
            return
        try:
            self._check_caller()
        except StateError as error:
            error.message = "the round that was begun with wait=False needs the event loop that this would block"
            error.hint = (
                "await asyncio.to_thread(publishing.wait), where publishing is what publish(wait=False) returned"
            )
            raise

    def close(self) -> None:
        """Return when the round is over, by its deadline and the grace of its way back. What interrupts the wait calls the round off."""
        try:
            with contextlib.suppress(DeadlineExceeded):
                self.settle(Deadline(_GRACE_S + self._deadline.limit_s()))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Have the round end soon; it is taken back unless it is live."""
        self._deadline.cancel()

    def _end(self) -> None:
        self.cancel()
        if self._is_started:
            self._thread.join(_GRACE_S)

    @staticmethod
    def _late(deadline: Deadline) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the round that was begun with wait=False was not over after {deadline.timeout_s:g} s",
            hint="Wait longer: a round ends by the deadline that publish() was given",
        )


_GRACE_S = 5.0
"""How long after its deadline a round may still be on its way back, and a little more."""
_START_S = 1.0
"""How long a thread that was begun may take until it runs."""
