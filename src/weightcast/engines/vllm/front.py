"""A vLLM server's engine as weightcast's control routes want it: EngineCommitter's calls over vLLM's EngineClient.

Load-bearing: vLLM's own version label is set only after every worker committed; a commit that one of them could not carry out
is taken back in the others before generation goes on; an engine with a dirty worker is not resumed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from weightcast.engines.base import EngineStatus, PauseMode
from weightcast.engines.vllm.plugin import BACKEND
from weightcast.errors import EngineError, InvalidInput, StateError
from weightcast.outcome import WorkerOutcome, common_version, first_error, outcomes_from
from weightcast.server.control import EngineCommitter, RoundAnswer, RoundOrder
from weightcast.weight_transfer.weightcast import WeightcastInitInfo

logger = logging.getLogger(__name__)

CALL = "weightcast_call"


class VllmFront:
    """What EngineCommitter asks of an engine; ``client`` is vLLM's EngineClient. For one event loop."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._outcomes: list[WorkerOutcome] = []
        self._num_syncs = 0

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._require_backend()
        size = await self.get_world_size()
        self._raise_first(await self._call("init", {"init_info": dict(init_info), "world_size": size}))

    async def shutdown_weight_transfer_engine(self) -> None:
        self._require_backend()
        self._raise_first(await self._call("shutdown"))

    async def start_weight_update(self) -> None:
        """Nothing: the workers begin and end a round within one call, so that no step can come in between."""
        self._require_backend()

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        outcomes = await self._call("update", dict(update_info))
        error = first_error(outcomes)
        if error is not None:
            if update_info.get("action") == "commit" and any(outcome.error_kind == "" for outcome in outcomes):
                await self._call("update", {**_without_version(update_info), "action": "rollback"})
            await self._name_version()
            raise error

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._name_version()
        self._num_syncs += 1

    async def is_paused(self) -> bool:
        return bool(await self._client.is_paused())

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """As vLLM's, but without the 20 ms that it sleeps so that ended requests' last outputs arrive first: frozen
        requests have none, and they would stand still as long."""
        pause = getattr(self._client.engine_core, "pause_scheduler_async", None)
        forget = getattr(getattr(self._client, "renderer", None), "clear_mm_cache_async", None)
        if mode != "keep" or pause is None or forget is None:
            await self._client.pause_generation(mode=mode, clear_cache=clear_cache)
            return
        if clear_cache:
            await forget()
        await pause(mode=mode, clear_cache=clear_cache)

    async def resume_generation(self) -> None:
        """Go on, unless the weights are of no version."""
        if any(outcome.dirty for outcome in self._outcomes):
            logger.error("the weights are of no version: generation stays paused until an update succeeds")
            return
        await self._client.resume_generation()

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return bool(await self._client.reset_prefix_cache(reset_running_requests))

    async def get_world_size(self, include_dp: bool = True) -> int:
        parallel = self._client.vllm_config.parallel_config
        return int(parallel.world_size_across_dp if include_dp else parallel.world_size)

    async def get_weight_version(self) -> str:
        """vLLM's label; what the workers say where vLLM (before 0.28) has none."""
        if hasattr(self._client, "get_weight_version"):
            return str(await self._client.get_weight_version())
        return common_version(self._outcomes or await self._call("status"))

    async def checksums(self) -> dict[str, str]:
        outcomes = await self._call("checksums")
        self._raise_first(outcomes)
        many = len(outcomes) > 1
        return {
            f"{outcome.rank}:{name}" if many else name: digest
            for outcome in outcomes
            for name, digest in outcome.checksums.items()
        }

    async def status(self) -> EngineStatus:
        """Counts that vLLM does not tell are those of its scheduler's metrics, and zero here."""
        self._require_backend()
        outcomes = await self._call("status")
        dirty = any(outcome.dirty for outcome in outcomes)
        cache = self._client.vllm_config.cache_config
        processor = getattr(self._client, "output_processor", None)
        return EngineStatus(
            model=str(self._client.vllm_config.model_config.model),
            weight_version=outcomes[0].weight_version if dirty else await self.get_weight_version(),
            digest=outcomes[0].digest or None,
            ready=not dirty,
            reason="the weights are of no version: an update failed half-way; the next one heals it" if dirty else "",
            dirty=dirty,
            paused=await self.is_paused(),
            num_running=processor.get_num_unfinished_requests() if processor is not None else 0,
            num_waiting=0,
            num_kv_tokens=0,
            kv_capacity_tokens=(cache.num_gpu_blocks or 0) * cache.block_size,
            num_generated_tokens=0,
            num_preemptions=0,
            num_syncs=self._num_syncs,
            world_size=await self.get_world_size(),
            backend=BACKEND,
        )

    # -- pieces

    async def _name_version(self) -> None:
        version = common_version(self._outcomes)
        if hasattr(self._client, "update_weight_version") and await self.get_weight_version() != version:
            await self._client.update_weight_version(version)

    async def _call(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        arguments = (action, dict(payload or {}))
        core = self._client.engine_core
        if self._client.vllm_config.parallel_config.data_parallel_size > 1 and hasattr(core, "call_utility_all_async"):
            answers = await core.call_utility_all_async("collective_rpc", CALL, None, arguments, None)
            flat = [answer for replica in answers for answer in replica]
        else:
            flat = await self._client.collective_rpc(CALL, args=arguments)
        self._outcomes = outcomes_from(flat)
        return self._outcomes

    @staticmethod
    def _raise_first(outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error

    def _require_backend(self) -> None:
        config = self._client.vllm_config.weight_transfer_config
        if config is None or config.backend != BACKEND:
            raise StateError(
                "this vLLM was not started with weightcast's weight transfer",
                hint='Start it with --weight-transfer-config \'{"backend": "weightcast"}\'',
            )


class VllmControl(EngineCommitter):
    """EngineControl over a vLLM engine; the engine is known when the server's start is over."""

    def __init__(self) -> None:
        self._front: VllmFront | None = None

    def attach(self, client: Any) -> None:
        """Take the server's EngineClient."""
        self._front = VllmFront(client)
        super().__init__(self._front)  # type: ignore[arg-type]

    @property
    def front(self) -> VllmFront:
        if self._front is None:
            raise EngineError("the engine is not up yet", hint="Ask again")
        return self._front

    async def init(self, init_info: Mapping[str, Any]) -> None:
        """Checked here already, so that bad input is told apart before any worker is asked."""
        check_init_info(init_info)
        self.front._require_backend()
        await super().init(init_info)

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        front = self.front
        front._require_backend()
        if order.pause == "none" and await front.get_world_size() > 1:
            # Between two workers' commits no step may come in, and vLLM promises that only while it is paused.
            order = _paused(order)
        return await super().carry_out(order)

    async def shutdown(self) -> None:
        await self.front.shutdown_weight_transfer_engine()

    async def status(self) -> EngineStatus:
        return await self.front.status()


def check_init_info(init_info: Mapping[str, Any]) -> None:
    """Raise InvalidInput, with the field, for an init_info that no worker could use."""
    try:
        msgspec.convert(dict(init_info), WeightcastInitInfo)
    except msgspec.ValidationError as error:
        text = str(error)
        named = text.partition("field `")[2].partition("`")[0] or text.rpartition("`$.")[2].rstrip("`")
        raise InvalidInput(f"init_info: {text}", field=f"init_info.{named}" if named else "init_info") from None


def _without_version(update_info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in update_info.items() if name != "version"}


def _paused(order: RoundOrder) -> RoundOrder:
    return dataclasses.replace(order, pause="keep")
