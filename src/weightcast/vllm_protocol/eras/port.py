"""The port of a vLLM EngineClient: the steps of a commit over the calls of its era. For the engine's event loop.

Load-bearing: a hold outlives the process that asked for it, so the workers keep in mind that the pause is weightcast's. Whoever
heals the engine, maybe another process of the server, lets it go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    Awaitable,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar

from weightcast.commit.order import RoundOrder, Serving, Standing
from weightcast.commit.updates import update_info
from weightcast.commit.worker_outcome import (
    WorkerOutcome,
    asleep_tags,
    outcomes_from,
    require_all,
    sleeps,
    tags_to_wake,
    why_asleep,
)
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, WeightcastError
from weightcast.vllm_protocol.eras.base import (
    GONE_HINT,
    ServedEngine,
    may_sleep,
    require_backend,
    require_sleep_mode,
)

T = TypeVar("T")

LOOK_S = 0.25
"""How often a wait looks whether the engine is still there."""


class ServedPort:
    """Workers that never raise, behind one event loop."""

    def __init__(self, engine: ServedEngine) -> None:
        self.engine = engine

    async def asleep(self, deadline: Deadline) -> str:
        """Workers say what vLLM has unmapped in them; one without sleep mode is not asked."""
        return why_asleep(await self.ask("status")) if may_sleep(self.engine.config) else ""

    async def standing(self, deadline: Deadline) -> Standing:
        must_pause = self.engine.world_size() > 1
        if not await self._named(self.engine.is_paused()):
            return Standing(paused=False, must_pause=must_pause)
        held = any(outcome.held for outcome in await self.ask("status"))
        return Standing(paused=True, held=held, must_pause=must_pause)

    async def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        await self._named(self.engine.pause(mode, clear_cache))

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return Serving.of(await self.ask("update", update_info(order, deadline)))

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        back = RoundOrder(action="rollback", epoch=order.epoch, round=order.round)
        return Serving.of(await self.ask("update", update_info(back, deadline)))

    async def forget(self, deadline: Deadline) -> None:
        await self._named(self.engine.forget_cache())

    async def name(self, version: str, deadline: Deadline) -> None:
        await self._named(self.engine.set_label(version))

    async def serving(self, deadline: Deadline) -> Serving:
        return Serving.of(await self.ask("status"))

    async def hold(self, reason: str, deadline: Deadline) -> None:
        if not await self._named(self.engine.is_paused()):
            await self._named(self.engine.pause("keep", clear_cache=False))
        await self.ask("hold", {"held": True})

    async def resume(self, was_held: bool, deadline: Deadline) -> None:
        """A scheduler whose keys and values sleep is let go on by whoever wakes them up, and not before."""
        if not (may_sleep(self.engine.config) and sleeps(await self.ask("status"))):
            await self._named(self.engine.resume())
        if was_held:
            await self.ask("hold", {"held": False})

    async def wake(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Wake up what sleeps of these tags, or all of it where none are given; what sleeps on. Unsupported without sleep mode."""
        require_sleep_mode(self.engine.config)
        wanted = tags_to_wake(await self.ask("status"), tags)
        if wanted:
            await self._named(self.engine.wake_up(wanted))
        return asleep_tags(await self.ask("status"))

    async def ask(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        """``weightcast_call`` in all workers of all replicas. Unsupported unless every worker answers."""
        require_backend(self.engine.config)
        outcomes = outcomes_from(await self._named(self.engine.call_workers(action, payload or {})))
        require_all(outcomes, self.engine.world_size())
        return outcomes

    async def _named(self, call: Awaitable[T]) -> T:
        """The call's result; EngineError for what vLLM raises, and once the engine is dead: vLLM leaves such calls unanswered."""
        work = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
                if gone := self.engine.gone():
                    raise EngineError(gone, hint=GONE_HINT)
            return work.result()
        except WeightcastError:
            raise
        except Exception as error:
            hint = GONE_HINT if self.engine.gone() else None
            raise EngineError(f"vLLM raised {type(error).__name__}: {error}", hint=hint) from error
        finally:
            work.cancel()
