"""A vLLM server's engine as weightcast's control routes want it; its commits are carried out through vllm_protocol.eras.port."""

from __future__ import annotations

import logging
from collections.abc import (
    Mapping,
    Sequence,
)
from typing import Any

import msgspec

from weightcast.commit.joining import greeting, join_async, joining
from weightcast.commit.order import RoundAnswer, RoundOrder, Serving
from weightcast.commit.shells import OWED_S, AsyncCommitter
from weightcast.commit.worker_outcome import NO_VERSION, WorkerOutcome, common_version, first_error, why_unfit
from weightcast.content.live_tensors import tensor_digests
from weightcast.deadline import Deadline
from weightcast.engines.base import EngineStatus, LiveDigests
from weightcast.errors import EngineError, InvalidInput
from weightcast.manifest import Manifest
from weightcast.server.control import details_of
from weightcast.untrusted.known import known
from weightcast.vllm_protocol.eras import BACKEND, require_backend, served_engine
from weightcast.vllm_protocol.eras.port import ServedPort
from weightcast.weight_transfer.weightcast import WeightcastInitInfo

logger = logging.getLogger(__name__)


class VllmFront:
    """What the routes ask of the engine beside commits; ``client`` is vLLM's EngineClient. For one event loop."""

    def __init__(self, client: Any) -> None:
        self.engine = served_engine(client)
        self.port = ServedPort(self.engine)

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self.require_backend()
        await join_async(joining(init_info, self.engine.world_size()), self._call)

    async def greet(self, init_info: Mapping[str, Any]) -> None:
        """Have the workers greet a trainer; what then has them join does not wait for the trainer."""
        self.require_backend()
        await join_async(greeting(init_info, self.engine.world_size()), self._call)

    async def shutdown_weight_transfer_engine(self) -> None:
        self.require_backend()
        self._raise_first(await self._call("shutdown"))

    async def close_update(self, label: str | None) -> None:
        """End an update of vLLM's own routes: named ``label`` when every worker carried it out, else the first error is raised."""
        self.require_backend()
        await self.raise_outcome(closes=False)
        await self.engine.close_update()
        outcomes = await self._call("status")
        error = first_error(outcomes)
        await self.name_or_hold(outcomes)
        if error is not None:
            raise error
        if label is not None:
            await self.engine.set_label(label)

    async def raise_outcome(self, *, closes: bool) -> None:
        """Raise what the last call of vLLM's own routes came to, if any worker could not carry it out; what is then of no version is
        held. ``closes``: as for a call that raises in vLLM's worker, no update is open after that."""
        outcomes = await self._call("status")
        error = first_error(outcomes)
        if error is None:
            return
        if closes:
            await self.engine.close_update()
        await self.name_or_hold(outcomes)
        raise error

    async def get_world_size(self, include_dp: bool = True) -> int:
        return self.engine.world_size(include_dp)

    async def get_weight_version(self) -> str:
        """What the workers say; vLLM's label may say anything. EngineError when they do not agree."""
        return common_version(await self._call("status"))

    async def is_empty(self) -> bool:
        """Whether weights were lost in a sleep, so that no version is served."""
        return any(outcome.weight_version == NO_VERSION for outcome in await self._call("status"))

    async def checksums(self) -> dict[str, str]:
        outcomes = await self._call("checksums")
        self._raise_first(outcomes)
        many = len(outcomes) > 1
        return {
            f"{outcome.rank}:{name}" if many else name: digest
            for outcome in outcomes
            for name, digest in outcome.checksums.items()
        }

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """What all workers together hold of each tensor of a checkpoint."""
        self.require_backend()
        outcomes = await self._call("digests", {"tensors": msgspec.to_builtins(manifest.tensors)})
        self._raise_first(outcomes)
        tensors = tensor_digests(manifest, [outcome.tensors for outcome in outcomes])
        return LiveDigests(weight_version=common_version(outcomes), tensors=tensors)

    async def status(self) -> EngineStatus:
        """What the workers say of their weights. Most counts are told by the metrics of vLLM's scheduler alone, and None here."""
        self.require_backend()
        outcomes = await self._call("status")
        reason = why_unfit(outcomes)
        config = self.engine.config
        blocks = config.cache_config.num_gpu_blocks
        return EngineStatus(
            model=str(config.model_config.model),
            weight_version=outcomes[0].weight_version,
            digest=outcomes[0].digest or None,
            ready=not reason,
            reason=f"{reason}; the next one heals it" if reason else "",
            dirty=bool(reason),
            paused=await self.engine.is_paused(),
            num_running=self.engine.num_requests(),
            num_waiting=None,
            num_kv_tokens=None,
            kv_capacity_tokens=None if blocks is None else blocks * config.cache_config.block_size,
            num_generated_tokens=None,
            num_preemptions=None,
            num_syncs=min(outcome.num_syncs for outcome in outcomes),
            world_size=self.engine.world_size(),
            backend=BACKEND,
            alive=not self.engine.gone(),
        )

    def require_backend(self) -> None:
        require_backend(self.engine.config)

    # -- pieces

    async def name_or_hold(self, outcomes: list[WorkerOutcome]) -> None:
        """Name what all workers serve and let a held engine go on; where that is no one version, see to it that nothing is
        computed with it."""
        serving, deadline = Serving.of(outcomes), Deadline(OWED_S)
        if not serving.unfit:
            await self.port.name(common_version(outcomes), deadline)
            if serving.held:
                await self.port.resume(True, deadline)
        elif not await self.engine.is_paused():
            logger.error("%s: generation is paused until an update succeeds", serving.unfit)
            await self.port.hold(serving.unfit, deadline)

    async def _call(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        return await self.port.ask(action, payload)

    @staticmethod
    def _raise_first(outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error


class VllmControl:
    """EngineControl over a vLLM engine; the engine is known when the server's start is over."""

    def __init__(self) -> None:
        self._front: VllmFront | None = None
        self._committer: AsyncCommitter | None = None

    def attach(self, client: Any) -> None:
        """Take the server's EngineClient."""
        self._front = VllmFront(client)
        self._committer = AsyncCommitter(self._front.port)

    @property
    def is_attached(self) -> bool:
        return self._front is not None

    @property
    def front(self) -> VllmFront:
        if self._front is None:
            raise EngineError("the engine is not up yet", hint="Ask again")
        return self._front

    @property
    def committer(self) -> AsyncCommitter:
        if self._committer is None:
            raise EngineError("the engine is not up yet", hint="Ask again")
        return self._committer

    async def init(self, init_info: Mapping[str, Any]) -> None:
        """Checked here already, so that bad input is told apart before any worker is asked."""
        check_init_info(init_info)
        await self.front.init_weight_transfer_engine(init_info)
        self.committer.forget()

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        self.front.require_backend()
        return await self.committer.carry_out(order)

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
