"""What weightcast's control routes need of whatever stands behind them, and how an InferenceEngine gives it."""

from __future__ import annotations

import asyncio
from collections.abc import (
    Coroutine,
    Mapping,
    Sequence,
)
from typing import Any, Protocol, TypeVar

from weightcast.commit.adapters import AsyncAdapterPort
from weightcast.commit.engines import AsyncEnginePort
from weightcast.commit.order import CommitPause, RoundAnswer, RoundOrder
from weightcast.commit.shells import OWED_S, AsyncCommitter
from weightcast.deadline import Deadline
from weightcast.engines.base import DigestsTensors, EngineStatus, HoldsAdapters, InferenceEngine, LiveDigests, PauseMode
from weightcast.errors import MERGED_HINT, DeadlineExceeded, UnknownModel, Unsupported
from weightcast.manifest import Manifest

T = TypeVar("T")
NO_ADAPTERS = "this engine takes whole weights, and no adapters"


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

    async def wake(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Wake up what sleeps of the memory with these tags, or all of it; what sleeps on. Unsupported where nothing ever does."""
        ...

    async def status(self) -> EngineStatus: ...

    async def details(self, with_checksums: bool) -> dict[str, Any]:
        """What only the owner of the token may see."""
        ...

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """What lies in the live weights of each tensor of a checkpoint; Unsupported where nobody knows."""
        ...


class EngineCommitter:
    """EngineControl over an InferenceEngine."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._committer = AsyncCommitter(AsyncEnginePort(engine, wrapped=False))
        self._adapters: dict[str, AsyncCommitter] = {}

    async def init(self, init_info: Mapping[str, Any]) -> None:
        adapter = init_info.get("adapter") or ""
        if adapter and not isinstance(self._engine, HoldsAdapters):
            raise Unsupported(NO_ADAPTERS, hint=MERGED_HINT)
        await self._engine.init_weight_transfer_engine(init_info)
        self._of(adapter).forget()

    async def shutdown(self) -> None:
        await self._engine.shutdown_weight_transfer_engine()

    async def wake(self, tags: Sequence[str]) -> tuple[str, ...]:
        raise Unsupported(
            "this engine cannot sleep",
            hint="Publish without wake=, or to engines that sleep only: vLLM with --enable-sleep-mode, SGLang with --enable-memory-saver",
        )

    async def status(self) -> EngineStatus:
        return await self._engine.status()

    async def details(self, with_checksums: bool) -> dict[str, Any]:
        details = details_of(self._committer)
        if with_checksums:
            details["checksums"] = await self._engine.checksums()
        return details

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        if not isinstance(self._engine, DigestsTensors):
            raise Unsupported("this engine does not say where checkpoint tensors lie in its live weights")
        return await self._engine.tensor_digests(manifest)

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        return await self._of(order.adapter).carry_out(order)

    def _of(self, adapter: str) -> AsyncCommitter:
        """What carries out the orders for an adapter, or for the model where that is empty."""
        if not adapter:
            return self._committer
        if adapter not in self._adapters:
            if not isinstance(self._engine, HoldsAdapters):
                raise Unsupported(NO_ADAPTERS, hint=MERGED_HINT)
            if adapter not in self._engine.joined_adapters:
                raise UnknownModel(f"no trainer publishes an adapter {adapter[:80]!r} here", field="adapter")
            self._adapters[adapter] = AsyncCommitter(AsyncAdapterPort(self._engine, adapter))
        return self._adapters[adapter]


def details_of(committer: AsyncCommitter) -> dict[str, Any]:
    """What a committer knows of its orders, for the status."""
    orders = committer.orders
    return {
        "last_order": orders.last[0] if orders.last else None,
        "last_answer": orders.last[1] if orders.last else None,
        "last_error": orders.last_error,
        "committing": committer.committing,
    }


async def pause_within(engine: InferenceEngine, mode: PauseMode, clear_cache: bool, deadline: Deadline) -> None:
    """Pause; when that takes longer than the deadline, undo it (unless it was paused before) and raise."""
    was_paused = await _by(deadline, engine.is_paused(), "asking whether the engine is paused")
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            await engine.pause_generation(mode, clear_cache)
    except TimeoutError:
        if not was_paused:
            patience = Deadline(max(deadline.remaining_s(), OWED_S))
            await _by(patience, engine.resume_generation(), "resuming generation")
        raise DeadlineExceeded(
            f"pausing (mode {mode}) took longer than {deadline.timeout_s:g} s",
            hint="Nothing was changed. Mode wait takes as long as the longest request; keep takes one step",
        ) from None


async def _by(deadline: Deadline, work: Coroutine[Any, Any, T], what: str) -> T:
    """``work``, given up when the deadline passes; DeadlineExceeded says what took so long."""
    try:
        async with asyncio.timeout(deadline.remaining_s()):
            return await work
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded):
            raise
        raise DeadlineExceeded(f"{what} took longer than {deadline.timeout_s:g} s") from None


__all__ = [
    "CommitPause",
    "EngineCommitter",
    "EngineControl",
    "RoundAnswer",
    "RoundOrder",
    "details_of",
    "pause_within",
]
