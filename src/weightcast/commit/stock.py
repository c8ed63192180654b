"""Stock engines, whose workers never raise: what is called of one, and its port. For the engine's event loop.

``StockEngine`` is the contract: an adapter implements it once for each interface that its engine has had. ``StockPort`` carries out the
steps of a commit over those calls.

Load-bearing: a hold outlives the process that asked for it, so the workers keep in mind that the pause is weightcast's. Whoever
heals the engine, maybe another process of the server, lets it go on.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import (
    Awaitable,
    Collection,
    Mapping,
    Sequence,
)
from typing import Any, ClassVar, TypeVar

from weightcast.commit.order import RoundOrder, Serving, Standing
from weightcast.commit.updates import update_info
from weightcast.commit.worker_outcome import (
    KEYS_AND_VALUES,
    WEIGHTS,
    WorkerOutcome,
    asleep_tags,
    outcomes_from,
    require_all,
    sleeps,
    tags_to_wake,
    why_asleep,
)
from weightcast.deadline import Deadline
from weightcast.errors import MERGED_HINT, EngineError, Unsupported, WeightcastError

T = TypeVar("T")

LOOK_S = 0.25
"""How often a wait looks whether the engine is still there."""
GONE_HINT = "Restart the engine, then publish again"


class StockEngine(ABC):
    """The calls of a stock engine that weightcast makes beside the engine's workers. Coroutines run on the engine's event loop."""

    product: ClassVar[str]
    """The engine's name in errors, such as "vLLM"."""
    tags_by_name: ClassVar[tuple[str, ...]] = (WEIGHTS, KEYS_AND_VALUES)
    """The kinds of memory that the engine wakes up when it is told their names. Others wake with any of them."""

    @property
    def in_one_step(self) -> bool:
        """Whether an update changes all workers, and forgets keys and values where the order says so, between the same two steps of the
        engine. An engine of this kind needs no pause for a commit in mode "keep"."""
        return False

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The model that the engine was started with."""

    @property
    def kv_capacity_tokens(self) -> int | None:
        """How many tokens the engine has room for; None where the engine does not tell."""
        return None

    @abstractmethod
    def world_size(self, include_dp: bool = True) -> int:
        """The number of workers: of all data-parallel replicas, or of one."""

    @abstractmethod
    def require_backend(self) -> None:
        """Raise StateError where the engine's workers do not know weightcast's calls."""

    @abstractmethod
    async def call_workers(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        """Carry out a call of weightcast's in the workers of all replicas; the workers' answers, each a WorkerOutcome in builtin types."""

    async def update(self, info: Mapping[str, Any], clear_cache: bool) -> list[Any]:
        """Carry out a commit or a roll-back in the workers of all replicas, and return the workers' answers. ``clear_cache`` concerns
        engines that do so ``in_one_step``."""
        return await self.call_workers("update", info)

    def require_adapters(self) -> None:
        """Raise Unsupported where the engine cannot serve adapters beside its model; the error says what to start it with."""
        raise Unsupported(f"this {self.product} takes whole weights, and no adapters", hint=MERGED_HINT)

    async def call_about_adapter(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        """``call_workers``, about the adapter that the payload names: the workers also hear which versions requests name."""
        return await self.call_workers(action, payload)

    def point(self, name: str, label: str, ids: Mapping[str, int]) -> None:
        """Have requests for an adapter that come from now on run on the version ``label``, and on none where that is empty. ``ids`` are
        the versions that a request may name, with the engine's own numbers of them."""
        self.require_adapters()

    def retire(self, name: str, there: Collection[str] | None) -> None:
        """Take no request for a version of an adapter that is not ``there``; None: for none but that which its name stands for."""
        self.require_adapters()

    def num_requests_on(self, label: str) -> int:
        """How many requests that are not finished run on a version of an adapter."""
        return 0

    @abstractmethod
    async def is_paused(self) -> bool:
        """Whether any replica stands still."""

    @abstractmethod
    async def pause(self, mode: str, clear_cache: bool) -> None:
        """Stop all replicas between two steps. A paused engine forgets its caches all the same."""

    @abstractmethod
    async def resume(self) -> None:
        """Let all replicas go on. A second call does nothing."""

    @abstractmethod
    async def forget_cache(self) -> None:
        """Drop cached keys and values, those of running requests as well, which recompute them; EngineError when refused."""

    @abstractmethod
    async def set_label(self, version: str) -> None:
        """Name the version that outputs carry; nothing where the engine's outputs carry none."""

    def gone(self) -> str:
        """Why the engine answers nothing any more: one of its processes died. Empty while the engine does not say so."""
        return ""

    def num_requests(self) -> int | None:
        """Requests that are not finished; None where the engine does not tell."""
        return None

    def may_sleep(self) -> bool:
        """Whether the engine was started so that it can give its memory away for a while."""
        return False

    def require_sleep(self) -> None:
        """Raise Unsupported where the engine cannot sleep."""
        if not self.may_sleep():
            raise Unsupported(f"this {self.product} cannot sleep", hint="Publish without wake=")

    async def wake_up(self, tags: Sequence[str]) -> None:
        """Map memory with these tags again, in every replica."""
        self.require_sleep()


class StockPort:
    """The steps of a commit (see commit.machine) over a StockEngine's calls."""

    def __init__(self, engine: StockEngine) -> None:
        self.engine = engine

    async def asleep(self, deadline: Deadline) -> str:
        """Workers say what their engine has unmapped in them; one that cannot sleep is not asked."""
        return why_asleep(await self.ask("status")) if self.engine.may_sleep() else ""

    async def standing(self, deadline: Deadline) -> Standing:
        in_one_step = self.engine.in_one_step
        must_pause = not in_one_step and self.engine.world_size() > 1
        paused = await self._named(self.engine.is_paused())
        held = paused and any(outcome.held for outcome in await self.ask("status"))
        return Standing(paused=paused, held=held, must_pause=must_pause, in_one_step=in_one_step)

    async def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        await self._named(self.engine.pause(mode, clear_cache))

    async def apply(self, order: RoundOrder, deadline: Deadline) -> Serving:
        return Serving.of(await self._update(order, deadline))

    async def take_back(self, order: RoundOrder, deadline: Deadline) -> Serving:
        back = RoundOrder(action="rollback", epoch=order.epoch, round=order.round, clear_cache=order.clear_cache)
        return Serving.of(await self._update(back, deadline))

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
        if not (self.engine.may_sleep() and sleeps(await self.ask("status"))):
            await self._named(self.engine.resume())
        if was_held:
            await self.ask("hold", {"held": False})

    async def wake(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Wake up what sleeps of these tags, or all of it where none are given; what sleeps on. Unsupported where nothing can sleep."""
        self.engine.require_sleep()
        wanted = tags_to_wake(await self.ask("status"), tags, self.engine.tags_by_name)
        if wanted:
            await self._named(self.engine.wake_up(wanted))
        return asleep_tags(await self.ask("status"))

    async def ask(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        """A call of weightcast's in all workers of all replicas. Unsupported unless every worker answers."""
        self.engine.require_backend()
        return await self.outcomes(self.engine.call_workers(action, payload or {}))

    async def _update(self, order: RoundOrder, deadline: Deadline) -> list[WorkerOutcome]:
        self.engine.require_backend()
        return await self.outcomes(self.engine.update(update_info(order, deadline), order.clear_cache))

    async def outcomes(self, call: Awaitable[list[Any]]) -> list[WorkerOutcome]:
        """The answers of all workers to a call of the engine. Unsupported unless every worker answers."""
        outcomes = outcomes_from(await self._named(call))
        require_all(outcomes, self.engine.world_size())
        return outcomes

    async def _named(self, call: Awaitable[T]) -> T:
        """The call's result; EngineError for what the engine raises, and once the engine is dead: a dead engine may leave calls
        unanswered."""
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
            raise EngineError(f"{self.engine.product} raised {type(error).__name__}: {error}", hint=hint) from error
        finally:
            work.cancel()
