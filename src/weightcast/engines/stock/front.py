"""A stock engine's server as weightcast's control routes want it: questions to its workers, and commits between two steps of theirs."""

from __future__ import annotations

import logging
from collections.abc import (
    Callable,
    Mapping,
    Sequence,
)
from typing import Any, Generic, TypeVar

import msgspec

from weightcast.commit.joining import greeting, join_async, joining
from weightcast.commit.order import RoundAnswer, RoundOrder, Serving
from weightcast.commit.shells import OWED_S, AsyncCommitter
from weightcast.commit.stock import StockEngine, StockPort
from weightcast.commit.stock_adapters import StockAdapterPort
from weightcast.commit.worker_outcome import NO_VERSION, WorkerOutcome, common_version, first_error, why_unfit
from weightcast.content.live_tensors import tensor_digests
from weightcast.deadline import Deadline
from weightcast.engines.base import AdapterStatus, EngineStatus, LiveDigests
from weightcast.errors import EngineError, InvalidInput
from weightcast.manifest import Manifest
from weightcast.manifest.adapters import check_name, version_label
from weightcast.server.control import details_of
from weightcast.untrusted.known import known
from weightcast.weight_transfer.weightcast import WeightcastInitInfo

logger = logging.getLogger(__name__)

BACKEND = "weightcast"

EngineT = TypeVar("EngineT", bound=StockEngine)


class StockFront(Generic[EngineT]):
    """What the routes ask of a stock engine beside commits. For one event loop."""

    def __init__(self, engine: EngineT) -> None:
        self.engine = engine
        self.port = StockPort(engine)

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Have the workers join a trainer."""
        self.engine.require_backend()
        await join_async(joining(init_info, self.engine.world_size()), self.port_of(init_info.get("adapter") or "").ask)

    def port_of(self, adapter: str) -> StockPort | StockAdapterPort:
        """The steps of commits of an adapter, or of the model where that is empty. Unsupported where the engine has no adapters."""
        if not adapter:
            return self.port
        self.engine.require_adapters()
        return StockAdapterPort(self.engine, adapter)

    async def greet(self, init_info: Mapping[str, Any]) -> None:
        """Have the workers greet a trainer. When the workers then join, their join does not wait for the trainer."""
        self.engine.require_backend()
        await join_async(greeting(init_info, self.engine.world_size()), self.port.ask)

    async def shutdown_weight_transfer_engine(self) -> None:
        """Have the workers leave their trainer. A second call does nothing."""
        await self._asked("shutdown")

    async def get_world_size(self, include_dp: bool = True) -> int:
        return self.engine.world_size(include_dp)

    async def get_weight_version(self) -> str:
        """Return the version that the workers say they serve; the engine's own label may say something else. EngineError when the
        workers do not agree."""
        return common_version(await self.port.ask("status"))

    async def is_empty(self) -> bool:
        """Whether a sleep lost the weights, so that the engine serves no version."""
        return any(outcome.weight_version == NO_VERSION for outcome in await self.port.ask("status"))

    async def checksums(self) -> dict[str, str]:
        """Hex digest of each live parameter, with the worker's rank before the name where there are several workers."""
        outcomes = await self._asked("checksums")
        many = len(outcomes) > 1
        return {
            f"{outcome.rank}:{name}" if many else name: digest
            for outcome in outcomes
            for name, digest in outcome.checksums.items()
        }

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """Return what all workers together hold of each tensor of a checkpoint."""
        outcomes = await self._asked("digests", {"tensors": msgspec.to_builtins(manifest.tensors)})
        tensors = tensor_digests(manifest, [outcome.tensors for outcome in outcomes])
        return LiveDigests(weight_version=common_version(outcomes), tensors=tensors)

    async def status(self) -> EngineStatus:
        """Return what the workers say of their weights. The engine tells most counts by its own metrics only; those counts are None
        here."""
        outcomes = await self.port.ask("status")
        reason = why_unfit(outcomes)
        engine = self.engine
        return EngineStatus(
            model=engine.model_name,
            weight_version=outcomes[0].weight_version,
            digest=outcomes[0].digest or None,
            ready=not reason,
            reason=f"{reason}; the next one heals it" if reason else "",
            dirty=bool(reason),
            paused=await engine.is_paused(),
            num_running=engine.num_requests(),
            num_waiting=None,
            num_kv_tokens=None,
            kv_capacity_tokens=engine.kv_capacity_tokens,
            num_generated_tokens=None,
            num_preemptions=None,
            num_syncs=min(outcome.num_syncs for outcome in outcomes),
            world_size=engine.world_size(),
            backend=BACKEND,
            alive=not engine.gone(),
            adapters={name: self._adapter_status(name, outcomes) for name in outcomes[0].adapters},
        )

    def _adapter_status(self, name: str, outcomes: list[WorkerOutcome]) -> AdapterStatus:
        """What is served under an adapter's name. Where workers do not agree, it is of no version."""
        served = [outcome.adapters.get(name) for outcome in outcomes]
        first = outcomes[0].adapters[name]
        is_one = all(each is not None and each.weight_version == first.weight_version for each in served)
        dirty = not is_one or any(each is None or each.dirty for each in served)
        return AdapterStatus(
            weight_version=first.weight_version,
            digest=first.digest or None,
            dirty=dirty,
            ready=not dirty and version_label(name, first.weight_version) in first.ids,
            versions={label: self.engine.num_requests_on(label) for label in first.ids},
        )

    async def name_or_hold(self, outcomes: list[WorkerOutcome]) -> None:
        """Name the version that all workers serve, and let a held engine go on. Where the workers serve no version, or several, pause
        the engine, so that it computes nothing with these weights. For updates that did not come as an order."""
        serving, deadline = Serving.of(outcomes), Deadline(OWED_S)
        if not serving.unfit:
            await self.port.name(common_version(outcomes), deadline)
            if serving.held:
                await self.port.resume(True, deadline)
        elif not await self.engine.is_paused():
            logger.error("%s: generation is paused until an update succeeds", serving.unfit)
            await self.port.hold(serving.unfit, deadline)

    async def _asked(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        """The answers of all workers. Raises the first error of any."""
        outcomes = await self.port.ask(action, payload)
        error = first_error(outcomes)
        if error is not None:
            raise error
        return outcomes


FrontT = TypeVar("FrontT", bound=StockFront[Any])


class StockControl(Generic[FrontT]):
    """EngineControl over a stock engine; the engine is known when the server's start is over."""

    def __init__(self, make_front: Callable[[Any], FrontT]) -> None:
        """``make_front`` makes a front of what the server gives its plug-ins."""
        self._make_front = make_front
        self._front: FrontT | None = None
        self._committer: AsyncCommitter | None = None
        self._adapters: dict[str, AsyncCommitter] = {}

    def attach(self, client: Any) -> None:
        """Take the server's engine."""
        self._front = self._make_front(client)
        self._committer = AsyncCommitter(self._front.port)

    @property
    def is_attached(self) -> bool:
        return self._front is not None

    @property
    def front(self) -> FrontT:
        if self._front is None:
            raise EngineError("the engine is not up yet", hint="Ask again when it is")
        return self._front

    @property
    def committer(self) -> AsyncCommitter:
        if self._committer is None:
            raise EngineError("the engine is not up yet", hint="Ask again when it is")
        return self._committer

    async def init(self, init_info: Mapping[str, Any]) -> None:
        """Have the engine join a trainer. The init_info is checked before any worker is asked."""
        check_init_info(init_info)
        adapter = init_info.get("adapter") or ""
        await self.front.init_weight_transfer_engine(init_info)
        self._of(adapter).forget()

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        self.front.engine.require_backend()
        return await self._of(order.adapter).carry_out(order)

    def _of(self, adapter: str) -> AsyncCommitter:
        """What carries out the orders for an adapter, or for the model where that is empty."""
        if not adapter:
            return self.committer
        if adapter not in self._adapters:
            self._adapters[adapter] = AsyncCommitter(self.front.port_of(check_name(adapter)))
        return self._adapters[adapter]

    async def shutdown(self) -> None:
        await self.front.shutdown_weight_transfer_engine()

    async def wake(self, tags: Sequence[str]) -> tuple[str, ...]:
        return await self.front.port.wake(tags)

    async def status(self) -> EngineStatus:
        return await self.front.status()

    async def details(self, with_checksums: bool) -> dict[str, Any]:
        details = details_of(self.committer)
        if with_checksums:
            details["checksums"] = await self.front.checksums()
        return details

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        return await self.front.tensor_digests(manifest)


def check_init_info(init_info: Mapping[str, Any]) -> None:
    """Raise InvalidInput, with the field, for an init_info that no worker could use."""
    try:
        msgspec.convert(dict(init_info), known(WeightcastInitInfo))
    except msgspec.ValidationError as error:
        text = str(error)
        named = text.partition("field `")[2].partition("`")[0] or text.rpartition("`$.")[2].rstrip("`")
        raise InvalidInput(f"init_info: {text}", field=f"init_info.{named}" if named else "init_info") from None
