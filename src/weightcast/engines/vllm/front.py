"""A vLLM server's engine as weightcast's control routes want it: EngineCommitter's calls over vLLM's EngineClient.

Load-bearing: vLLM's own version label is set only after every worker committed; a commit that one of them could not carry out
is taken back in the others before generation goes on. An engine whose weights are of no version, or of several, is held: it
stays paused, or is paused, and its workers keep in mind that this pause is ours. So whoever heals it, maybe another process of
the server, lets it go on, while a pause of somebody else's stays as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from weightcast.engines.base import EngineStatus, LiveDigests, PauseMode
from weightcast.errors import EngineError, InvalidInput
from weightcast.held import tensor_digests
from weightcast.known import known
from weightcast.manifest import Manifest
from weightcast.outcome import WorkerOutcome, common_version, first_error, outcomes_from, require_all, why_unfit
from weightcast.server.control import EngineCommitter, RoundAnswer, RoundOrder
from weightcast.vllm_eras import BACKEND, has_backend, require_backend, served_engine
from weightcast.weight_transfer.weightcast import WeightcastInitInfo

logger = logging.getLogger(__name__)


class VllmFront:
    """What EngineCommitter asks of an engine; ``client`` is vLLM's EngineClient. For one event loop."""

    def __init__(self, client: Any) -> None:
        self.engine = served_engine(client)
        self._round: list[WorkerOutcome] = []
        """What the workers said last in the round that is under way; empty when that is not known."""
        self._num_syncs = 0

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self.require_backend()
        size = self.engine.world_size()
        self._raise_first(await self._call("init", {"init_info": dict(init_info), "world_size": size}))

    async def shutdown_weight_transfer_engine(self) -> None:
        self.require_backend()
        self._raise_first(await self._call("shutdown"))

    async def start_weight_update(self) -> None:
        """Nothing: the workers begin and end a round within one call, so that no step can come in between."""
        self.require_backend()

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        self._round = []
        outcomes = await self._call("update", update_info)
        error = first_error(outcomes)
        if error is not None and update_info.get("action") == "commit" and any(o.error is None for o in outcomes):
            outcomes = await self._call("update", {**_without_version(update_info), "action": "rollback"})
        self._round = outcomes
        if error is not None:
            await self._name_or_hold(outcomes)
            raise error

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._name_or_hold(self._round)
        self._num_syncs += 1

    async def close_update(self, label: str | None) -> None:
        """End an update of vLLM's own routes: named ``label`` when every worker carried it out, else the first error is raised.

        Updates of other backends than weightcast's are ended as vLLM does.
        """
        await self.engine.close_update()
        if not has_backend(self.engine.config):
            if label is not None:
                await self.engine.set_label(label)
            return
        outcomes = await self._call("status")
        error = first_error(outcomes)
        if error is not None:
            await self._name_or_hold(outcomes)
            raise error
        await self.engine.set_label(label or common_version(outcomes))
        if any(outcome.held for outcome in outcomes):
            await self._go_on(outcomes)
        self._num_syncs += 1

    async def is_paused(self) -> bool:
        """Whether somebody else than weightcast paused the engine: what holds it because of its weights does not count."""
        if not await self.engine.is_paused():
            return False
        return not any(outcome.held for outcome in await self._call("status"))

    async def is_held(self) -> bool:
        """Whether the engine stands still because of its weights."""
        return await self.engine.is_paused() and not await self.is_paused()

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        self._round = []
        await self.engine.pause(mode, clear_cache)

    async def resume_generation(self) -> None:
        """Go on after a pause of the caller's own, unless the workers' weights are of no version or of several."""
        outcomes = self._round or await self._call("status")
        reason = why_unfit(outcomes)
        if reason:
            logger.error("%s: generation stays paused until an update succeeds", reason)
            await self._call("hold", {"held": True})
            return
        await self._go_on(outcomes)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        await self.engine.forget_cache(reset_running_requests)
        return True

    async def get_world_size(self, include_dp: bool = True) -> int:
        return self.engine.world_size(include_dp)

    async def get_weight_version(self) -> str:
        """What the workers say; vLLM's label may say anything. EngineError when they do not agree."""
        return common_version(await self._call("status"))

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
        """Counts that vLLM does not tell are those of its scheduler's metrics, and zero here."""
        self.require_backend()
        outcomes = await self._call("status")
        reason = why_unfit(outcomes)
        config = self.engine.config
        return EngineStatus(
            model=str(config.model_config.model),
            weight_version=outcomes[0].weight_version,
            digest=outcomes[0].digest or None,
            ready=not reason,
            reason=f"{reason}; the next one heals it" if reason else "",
            dirty=bool(reason),
            paused=await self.engine.is_paused(),
            num_running=self.engine.num_requests(),
            num_waiting=0,
            num_kv_tokens=0,
            kv_capacity_tokens=(config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size,
            num_generated_tokens=0,
            num_preemptions=0,
            num_syncs=self._num_syncs,
            world_size=self.engine.world_size(),
            backend=BACKEND,
        )

    def require_backend(self) -> None:
        require_backend(self.engine.config)

    # -- pieces

    async def _name_or_hold(self, outcomes: list[WorkerOutcome]) -> None:
        """Name what all workers serve; where that is no one version, see to it that nothing is computed with it."""
        reason = why_unfit(outcomes)
        if not reason:
            await self.engine.set_label(common_version(outcomes))
        elif not await self.engine.is_paused():
            logger.error("%s: generation is paused until an update succeeds", reason)
            await self.engine.pause("keep", clear_cache=False)
            await self._call("hold", {"held": True})

    async def _go_on(self, outcomes: list[WorkerOutcome]) -> None:
        await self.engine.resume()
        if any(outcome.held for outcome in outcomes):
            await self._call("hold", {"held": False})

    async def _call(self, action: str, payload: Mapping[str, Any] | None = None) -> list[WorkerOutcome]:
        outcomes = outcomes_from(await self.engine.call_workers(action, payload or {}))
        require_all(outcomes, self.engine.world_size())
        return outcomes

    @staticmethod
    def _raise_first(outcomes: list[WorkerOutcome]) -> None:
        error = first_error(outcomes)
        if error is not None:
            raise error


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
        self.front.require_backend()
        await super().init(init_info)

    async def carry_out(self, order: RoundOrder) -> RoundAnswer:
        front = self.front
        front.require_backend()
        if order.pause == "none" and (front.engine.world_size() > 1 or await front.is_held()):
            # Between two workers' commits no step may come in, and vLLM promises that only while it is paused. A held
            # engine stands still already, and must go on once it is healed.
            order = dataclasses.replace(order, pause="keep")
        return await super().carry_out(order)

    async def shutdown(self) -> None:
        await self.front.shutdown_weight_transfer_engine()

    async def status(self) -> EngineStatus:
        return await self.front.status()

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


def _without_version(update_info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in update_info.items() if name != "version"}
