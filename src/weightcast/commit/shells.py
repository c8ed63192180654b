"""Who carries out the steps of an order: on an event loop, or on a thread.

Load-bearing, for both: orders of one engine come one after the other, and an order that began runs to its end, even when its
caller's deadline passes or the caller goes away. The caller then hears DeadlineExceeded, and the engine is resumed all the same.
An order whose deadline passed before its turn is not carried out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

from weightcast.commit.machine import Do, Orders
from weightcast.commit.order import RoundAnswer, RoundOrder, Serving, Standing
from weightcast.commit.updates import named
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded
from weightcast.logs import about

logger = logging.getLogger(__name__)

T = TypeVar("T")

OWED_S = 10.0
"""Resuming is owed to the engine's users also when the round's time is up; but an engine that hangs must not keep the lock."""


class AsyncPort(Protocol):
    """An engine as the asynchronous shell asks it. Methods are those of machine.Step; errors are WeightcastErrors."""

    async def asleep(self, deadline: Deadline) -> str:
        """Why the weights are not where they can be changed; empty when they are."""
        ...

    async def standing(self, deadline: Deadline) -> Standing: ...

    async def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None: ...

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving: ...

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving: ...

    async def forget(self, deadline: Deadline) -> None: ...

    async def name(self, version: str, deadline: Deadline) -> None: ...

    async def serving(self, deadline: Deadline) -> Serving: ...

    async def hold(self, reason: str, deadline: Deadline) -> None: ...

    async def resume(self, was_held: bool, deadline: Deadline) -> None: ...


class Port(Protocol):
    """An engine as the synchronous shell asks it; each call ends by its deadline."""

    def asleep(self, deadline: Deadline) -> str: ...

    def standing(self, deadline: Deadline) -> Standing: ...

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None: ...

    def apply(self, order: RoundOrder, deadline: Deadline) -> Serving: ...

    def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving: ...

    def forget(self, deadline: Deadline) -> None: ...

    def name(self, version: str, deadline: Deadline) -> None: ...

    def serving(self, deadline: Deadline) -> Serving: ...

    def hold(self, reason: str, deadline: Deadline) -> None: ...

    def resume(self, was_held: bool, deadline: Deadline) -> None: ...


class _Run:
    """One order on its way: which step is next, and how long those before it took."""

    def __init__(self, orders: Orders, order: RoundOrder) -> None:
        self._order = order
        self._phases: dict[str, float] = {}
        steps = orders.steps(order, self._phases)
        self._steps = steps
        self._advance: Callable[[], Do] = partial(next, steps)
        self._started = 0.0
        self._waits: Do | None = None
        """A step that lasts as long as requests want, unless it is done."""
        self.answer = RoundAnswer(version="", phases={})

    def next(self) -> Do | None:
        """The step to carry out; None at the end. Raises what the order ends with."""
        try:
            do = self._advance()
        except StopIteration as end:
            self.answer = end.value
            self._log()
            return None
        self._started = time.perf_counter()
        self._waits = do if do.hint else self._waits
        return do

    def done(self, do: Do, result: Any) -> None:
        self._count(do)
        self._waits = None if do is self._waits else self._waits
        self._advance = partial(self._steps.send, result)

    def failed(self, do: Do, error: BaseException) -> None:
        self._count(do)
        self._advance = partial(self._steps.throw, named(error) if isinstance(error, Exception) else error)

    def late(self, deadline: Deadline) -> DeadlineExceeded | None:
        """Why the order is late, where that is known. Until then it changed nothing, and nothing is left to be done but its way back."""
        return None if self._waits is None else _too_long(self._waits, deadline)

    def _count(self, do: Do) -> None:
        phase = do.step.phase
        self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - self._started

    def _log(self) -> None:
        order, version, phases = self._order, self.answer.version, self.answer.phases
        # What the weights are now is said by the worker that has them; this is how long the engine took.
        logger.debug(
            "%s of round %d (epoch %d): version %s, pause %.3f s, apply %.3f s, resume %.3f s",
            order.action, order.round, order.epoch, version, phases["pause"], phases["apply"], phases["resume"],
            extra=about(epoch=order.epoch, round=order.round, version=version, phase=order.action),
        )  # fmt: skip


class Committer:
    """Carries out orders on the thread that calls. Not thread-safe: its owner calls from one thread at a time."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._orders = Orders()

    def carry_out(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        """Bring the order's round live, or take it back. A repeated order is harmless."""
        deadline.check("the engine's turn")
        run = _Run(self._orders, order)
        while (do := run.next()) is not None:
            try:
                run.done(do, self._step(do, deadline))
            except BaseException as error:  # noqa: BLE001 - the machine decides what an error leaves behind
                run.failed(do, error)
        return run.answer

    def forget(self) -> None:
        """A trainer joined: what was ordered before is no order of its."""
        self._orders.last = None

    def _step(self, do: Do, deadline: Deadline) -> Any:
        if not do.owed:
            deadline.check(do.what)
        return getattr(self._port, do.step.value)(*do.arguments, _patience(do, deadline))


class AsyncCommitter:
    """Carries out orders on an event loop."""

    def __init__(self, port: AsyncPort) -> None:
        self._port = port
        self.orders = Orders()
        self._one_at_a_time = asyncio.Lock()
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def committing(self) -> bool:
        """Whether an order is being carried out."""
        return self._one_at_a_time.locked()

    def forget(self) -> None:
        """A trainer joined: what was ordered before is no order of its."""
        self.orders.last = None

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        """Bring the order's round live, or take it back, within the order's time. A repeated order is harmless."""
        deadline, run = Deadline(order.timeout_s), _Run(self.orders, order)
        work = self._in_turn(run, order, deadline)
        return await within(deadline, work, f"the {order.action}", self._background, run.late)

    async def _in_turn(self, run: _Run, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        async with self._one_at_a_time:
            deadline.check(f"waiting for the order before this {order.action}")
            while (do := run.next()) is not None:
                try:
                    run.done(do, await self._step(do, deadline))
                except BaseException as error:  # noqa: BLE001 - the machine decides what an error leaves behind
                    run.failed(do, error)
            return run.answer

    async def _step(self, do: Do, deadline: Deadline) -> Any:
        if not do.owed:
            deadline.check(do.what)
        patience = _patience(do, deadline)
        work = getattr(self._port, do.step.value)(*do.arguments, patience)
        try:
            async with asyncio.timeout(None if do.step.runs_to_its_end else patience.limit_s()) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise _too_long(do, patience) from None


def _too_long(do: Do, patience: Deadline) -> DeadlineExceeded:
    return DeadlineExceeded(f"{do.what} took longer than {patience.timeout_s:g} s", hint=do.hint)


async def within(
    deadline: Deadline,
    work: Coroutine[Any, Any, T],
    what: str,
    background: set[asyncio.Task[Any]],
    late: Callable[[Deadline], DeadlineExceeded | None] = lambda deadline: None,
) -> T:
    """Wait for ``work`` until the deadline, then raise DeadlineExceeded and let it end in the background. ``late`` may know a better error."""
    task = asyncio.create_task(work)
    background.add(task)
    task.add_done_callback(background.discard)
    task.add_done_callback(_log_late_failure)
    done, _ = await asyncio.wait({task}, timeout=deadline.remaining_s())
    if not done:
        raise late(deadline) or DeadlineExceeded(
            f"{what} took longer than {deadline.timeout_s:g} s and still runs",
            hint="The engine's status says which version is live once it has ended",
        )
    return task.result()


def _log_late_failure(task: asyncio.Future[Any]) -> None:
    """Also marks the exception as seen: the caller may have left before it happened."""
    if not task.cancelled() and task.exception() is not None:
        logger.debug("weight operation failed: %s", task.exception())


def _patience(do: Do, deadline: Deadline) -> Deadline:
    """How long a step may take."""
    return Deadline(max(deadline.remaining_s(), OWED_S)) if do.owed else deadline
