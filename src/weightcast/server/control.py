"""What weightcast's control routes need of whatever stands behind them, and how an InferenceEngine gives it.

Load-bearing: a commit that began runs to its end, even when its caller's deadline passes or the caller hangs up. The
answer is then DeadlineExceeded, the engine is still resumed, and /weightcast/status says what is live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from weightcast.deadline import Deadline
from weightcast.engines.base import DigestsTensors, EngineStatus, InferenceEngine, LiveDigests, PauseMode
from weightcast.errors import DeadlineExceeded, StateError, Unsupported, WeightcastError
from weightcast.manifest import Manifest
from weightcast.report.logs import about

logger = logging.getLogger(__name__)

T = TypeVar("T")

CommitPause = Literal["keep", "wait", "abort", "none"]

RESUME_AT_LEAST_S = 10.0
"""Resuming is owed to the engine's users also when the round's time is up; but an engine that hangs must not keep the lock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOrder:
    """Commit or roll back one staged round. ``version`` is empty for a roll-back."""

    action: Literal["commit", "rollback"]
    epoch: int
    round: int
    version: str = ""
    pause: CommitPause = "keep"
    clear_cache: bool = True
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAnswer:
    """What is live afterwards, and how long each phase took."""

    version: str
    phases: dict[str, float]


class EngineControl(Protocol):
    """The control routes' view of an engine."""

    async def init(self, init_info: Mapping[str, Any]) -> None:
        """Join a trainer's control channel."""
        ...

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        """Bring the order's round live, or take it back; pause state afterwards as before. A repeated order is harmless."""
        ...

    async def shutdown(self) -> None:
        """Leave the trainer; idempotent."""
        ...

    async def status(self) -> EngineStatus: ...

    async def details(self, with_checksums: bool) -> dict[str, Any]:
        """What only the owner of the token may see."""
        ...

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """What lies in the live weights of each tensor of a checkpoint; Unsupported where nobody knows."""
        ...


class EngineCommitter:
    """EngineControl over an InferenceEngine. Orders are carried out one at a time."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._one_at_a_time = asyncio.Lock()
        self._last: tuple[RoundOrder, RoundAnswer] | None = None
        self._last_error: str | None = None
        self._background: set[asyncio.Task[Any]] = set()

    async def init(self, init_info: Mapping[str, Any]) -> None:
        await self._engine.init_weight_transfer_engine(init_info)
        self._last = None

    async def shutdown(self) -> None:
        await self._engine.shutdown_weight_transfer_engine()

    async def status(self) -> EngineStatus:
        return await self._engine.status()

    async def details(self, with_checksums: bool) -> dict[str, Any]:
        details: dict[str, Any] = {
            "last_order": self._last[0] if self._last else None,
            "last_answer": self._last[1] if self._last else None,
            "last_error": self._last_error,
            "committing": self._one_at_a_time.locked(),
        }
        if with_checksums:
            details["checksums"] = await self._engine.checksums()
        return details

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        if not isinstance(self._engine, DigestsTensors):
            raise Unsupported("this engine does not say where checkpoint tensors lie in its live weights")
        return await self._engine.tensor_digests(manifest)

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        deadline = Deadline(order.timeout_s)
        return await within(deadline, self._in_turn(order, deadline), f"the {order.action}", self._background)

    async def _in_turn(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        async with self._one_at_a_time:
            repeated = await self._repeated(order)
            if repeated is not None:
                return repeated
            deadline.check(f"waiting for the order before this {order.action}")
            try:
                answer = await self._run(order, deadline)
            except WeightcastError as error:
                self._last_error = str(error.at(round=order.round))
                raise
            self._last, self._last_error = (order, answer), None
            return answer

    async def _repeated(self, order: RoundOrder) -> RoundAnswer | None:
        """The answer already given to this very round, as long as it still holds."""
        if self._last is None:
            return None
        done, answer = self._last
        same = (done.action, done.epoch, done.round, done.version) == (
            order.action,
            order.epoch,
            order.round,
            order.version,
        )
        return answer if same and await self._engine.get_weight_version() == answer.version else None

    async def _run(self, order: RoundOrder, deadline: Deadline) -> RoundAnswer:
        was_paused = await _by(deadline, self._engine.is_paused(), "asking whether the engine is paused")
        phases = {"pause": 0.0, "apply": 0.0, "resume": 0.0}
        try:
            if order.pause != "none":
                await _timed(phases, "pause", pause_within(self._engine, order.pause, order.clear_cache, deadline))
            deadline.check(f"pausing for the {order.action}")
            await _timed(phases, "apply", self._apply(order, deadline))
            if order.pause == "none" and order.clear_cache:
                await self._engine.reset_prefix_cache(reset_running_requests=True)
            # Before the engine goes on: afterwards the answer would wait for a step, and the first one recomputes caches.
            version = await self._engine.get_weight_version()
        finally:
            if not was_paused and order.pause != "none":
                await _timed(phases, "resume", _resume(self._engine, deadline))
        logger.info(
            "%s of round %d (epoch %d): version %s, pause %.3f s, apply %.3f s, resume %.3f s",
            order.action, order.round, order.epoch, version, phases["pause"], phases["apply"], phases["resume"],
            extra=about(epoch=order.epoch, round=order.round, version=version, phase=order.action),
        )  # fmt: skip
        return RoundAnswer(version=version, phases=phases)

    async def _apply(self, order: RoundOrder, deadline: Deadline) -> None:
        """One round of the weight-transfer contract: an update that raises has closed its round by itself.

        A finish that raises, whatever it raises, leaves its round open; a second call closes it or says that it is closed.
        """
        await self._engine.start_weight_update()
        update: dict[str, Any] = {
            "action": order.action,
            "epoch": order.epoch,
            "round": order.round,
            "timeout_s": deadline.limit_s(),
        }
        if order.version:
            update["version"] = order.version
        await self._engine.update_weights(update)
        try:
            await self._engine.finish_weight_update(order.version or None)
        except Exception:
            try:
                await self._engine.finish_weight_update(order.version or None)
            except StateError:
                logger.debug("the round was closed by the failed finish")
            raise


async def pause_within(engine: InferenceEngine, mode: PauseMode, clear_cache: bool, deadline: Deadline) -> None:
    """Pause; when that takes longer than the deadline, undo it (unless it was paused before) and raise."""
    was_paused = await _by(deadline, engine.is_paused(), "asking whether the engine is paused")
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            await engine.pause_generation(mode, clear_cache)
    except TimeoutError:
        if not was_paused:
            await _resume(engine, deadline)
        raise DeadlineExceeded(
            f"pausing (mode {mode}) took longer than {deadline.timeout_s:g} s",
            hint="Nothing was changed. Mode wait takes as long as the longest request; keep takes one step",
        ) from None


async def _resume(engine: InferenceEngine, deadline: Deadline) -> None:
    patience = Deadline(max(deadline.remaining_s(), RESUME_AT_LEAST_S))
    await _by(patience, engine.resume_generation(), "resuming generation")


async def _by(deadline: Deadline, work: Coroutine[Any, Any, T], what: str) -> T:
    """``work``, given up when the deadline passes; DeadlineExceeded says what took so long."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await work
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise DeadlineExceeded(f"{what} took longer than {deadline.timeout_s:g} s") from None


async def within(deadline: Deadline, work: Coroutine[Any, Any, T], what: str, background: set[asyncio.Task[Any]]) -> T:
    """Wait for ``work`` until the deadline, then raise DeadlineExceeded and let it end in the background."""
    task = asyncio.create_task(work)
    background.add(task)
    task.add_done_callback(background.discard)
    task.add_done_callback(_log_late_failure)
    done, _ = await asyncio.wait({task}, timeout=deadline.remaining_s())
    if not done:
        raise DeadlineExceeded(
            f"{what} took longer than {deadline.timeout_s:g} s and still runs",
            hint="GET /weightcast/status says which version is live once it has ended",
        )
    return task.result()


def _log_late_failure(task: asyncio.Task[Any]) -> None:
    """Also marks the exception as seen: the caller may have left before it happened."""
    if not task.cancelled() and task.exception() is not None:
        logger.debug("weight operation failed: %s", task.exception())


async def _timed(phases: dict[str, float], phase: str, work: Awaitable[None]) -> None:
    started = time.perf_counter()
    try:
        await work
    finally:
        phases[phase] = time.perf_counter() - started
