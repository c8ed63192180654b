"""The contract of an era, and what all eras have in common: vLLM's engine objects as weightcast uses them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import (
    Collection,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Any

from weightcast.commit.stock import StockEngine
from weightcast.errors import (
    MERGED_HINT,
    EngineError,
    StateError,
    Unsupported,
)
from weightcast.vllm_protocol.eras.adapters import AdapterNames

CALL = "weightcast_call"
"""The workers' method that ``collective_rpc`` reaches the backend by."""

ADAPTER_CALL = "weightcast_adapter_call"
"""The engine core's method that calls about adapters go through."""

BACKEND = "weightcast"


class ServedEngine(StockEngine):
    """An EngineClient: ``AsyncLLM``, or what a server gives its plug-ins. Its coroutines are for the engine's event loop."""

    product = "vLLM"

    def __init__(self, client: Any) -> None:
        self.client = client

    @staticmethod
    @abstractmethod
    def fits(client: Any) -> bool:
        """Whether the object has the calls of this era."""

    @abstractmethod
    async def in_each_replica(self, method: str, *arguments: Any) -> list[Any]:
        """Call a utility of every data-parallel replica's core; the answers in the replicas' order."""

    @property
    def config(self) -> Any:
        """The VllmConfig."""
        return self.client.vllm_config

    @property
    def model_name(self) -> str:
        return str(self.config.model_config.model)

    @property
    def kv_capacity_tokens(self) -> int | None:
        cache = self.config.cache_config
        return None if cache.num_gpu_blocks is None else int(cache.num_gpu_blocks * cache.block_size)

    def require_backend(self) -> None:
        require_backend(self.config)

    def may_sleep(self) -> bool:
        return may_sleep(self.config)

    def require_sleep(self) -> None:
        require_sleep_mode(self.config)

    def world_size(self, include_dp: bool = True) -> int:
        parallel = self.config.parallel_config
        return int(parallel.world_size_across_dp if include_dp else parallel.world_size)

    async def call_workers(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        """``weightcast_call`` in the workers of all replicas; their answers."""
        answers = await self.in_each_replica("collective_rpc", CALL, None, (action, dict(payload)), None)
        return [answer for replica in answers for answer in replica]

    def require_adapters(self) -> None:
        """Only the newest era has them."""
        raise Unsupported(OLD, hint=MERGED_HINT)

    async def call_about_adapter(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        answers = await self.in_each_replica(ADAPTER_CALL, action, dict(payload))
        return [answer for replica in answers for answer in replica]

    def point(self, name: str, label: str, ids: Mapping[str, int]) -> None:
        self.adapter_names().point(name, label, ids)

    def retire(self, name: str, there: Collection[str] | None) -> None:
        names = self.adapter_names()
        names.retire(name, [names.standing(name)] if there is None else there)

    def adapter_names(self) -> AdapterNames:
        """The names of adapters in this process, alike for all that reach the engine's object."""
        return names_of(self.client)

    def num_requests_on(self, label: str) -> int:
        states = getattr(getattr(self.client, "output_processor", None), "request_states", {})
        return sum(getattr(state, "lora_name", None) == label for state in list(states.values()))

    async def is_paused(self) -> bool:
        """Whether any replica stands still; asked one by one, because vLLM raises where they differ."""
        return any(await self.in_each_replica("is_scheduler_paused"))

    async def pause(self, mode: str, clear_cache: bool) -> None:
        """As vLLM's ``pause_generation``; a paused engine forgets its caches all the same.

        Frozen requests have no last outputs, so mode "keep" goes without the 20 ms that vLLM sleeps for those.
        """
        if mode != "keep":
            await self.client.pause_generation(mode=mode, clear_cache=clear_cache)
            return
        if clear_cache:
            await self.client.renderer.clear_mm_cache_async()
        await self.client.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)

    async def resume(self) -> None:
        await self.client.resume_generation()

    def gone(self) -> str:
        """Why the engine answers nothing any more: one of its processes died. Empty while vLLM does not say so."""
        if not getattr(self.client, "errored", False):
            return ""
        return f"vLLM's engine is dead: {getattr(self.client, 'dead_error', 'a process of it ended')}"

    async def forget_cache(self) -> None:
        if not await self.client.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(NOT_FORGOTTEN, hint="Publish again when fewer requests are in flight")

    def num_requests(self) -> int | None:
        """Requests that are not finished; None where vLLM's object does not tell."""
        processor = getattr(self.client, "output_processor", None)
        return None if processor is None else int(processor.get_num_unfinished_requests())

    async def wake_up(self, tags: Sequence[str]) -> None:
        """Map memory with these tags again, in every replica; vLLM lets its scheduler go on once nothing sleeps any more."""
        await self.client.wake_up(list(tags))

    async def close_update(self) -> None:
        """vLLM's own ``finish_weight_update`` in every worker, without naming a version."""
        await self.client.finish_weight_update()


class OfflineEngine(ABC):
    """An ``LLM`` of this process, which has no requests in flight while it is called."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @staticmethod
    @abstractmethod
    def fits(llm: Any) -> bool:
        """Whether the object has the calls of this era."""

    @abstractmethod
    def set_label(self, version: str) -> None:
        """Name the version that outputs carry; nothing where vLLM's outputs carry none."""

    @property
    def computes_here(self) -> bool:
        """Whether the one worker runs in this process: a call then is work of the thread that calls, on its streams."""
        return hasattr(getattr(self.llm.llm_engine, "model_executor", None), "driver_worker")

    @property
    def config(self) -> Any:
        """The VllmConfig."""
        return self.llm.llm_engine.vllm_config

    def world_size(self) -> int:
        return int(self.llm.get_world_size())

    def call_workers(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        """``weightcast_call`` in the workers; their answers."""
        answers: list[Any] = self.llm.collective_rpc(CALL, args=(action, dict(payload)))
        return answers

    def require_adapters(self) -> None:
        """Raise Unsupported where the engine cannot serve adapters of trainers beside its model."""
        if not hasattr(sys.modules["vllm.v1.engine.core"].EngineCore, ADAPTER_CALL):
            raise Unsupported(OLD, hint=MERGED_HINT)
        require_lora(self.config)
        names_of(self.llm.llm_engine)  # from now on requests by name are told from those for files

    def call_about_adapter(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        """``call_workers`` about an adapter, by way of the engine's core, which knows what requests name."""
        client = self.llm.llm_engine.engine_core
        here = getattr(client, "engine_core", None)
        call = partial(client.call_utility, ADAPTER_CALL) if here is None else getattr(here, ADAPTER_CALL)
        answers: list[Any] = call(action, dict(payload))
        return answers

    def point(self, name: str, label: str, ids: Mapping[str, int]) -> None:
        """See StockEngine.point."""
        names_of(self.llm.llm_engine).point(name, label, ids)

    def retire(self, name: str, there: Collection[str]) -> None:
        """See StockEngine.retire."""
        names_of(self.llm.llm_engine).retire(name, there)

    def wake_up(self, tags: Sequence[str]) -> None:
        """Map memory with these tags again; vLLM lets its scheduler go on once nothing sleeps any more."""
        self.llm.wake_up(list(tags))

    def forget_cache(self) -> None:
        """Drop cached keys and values; EngineError when refused."""
        if not self.llm.reset_prefix_cache():
            raise EngineError(NOT_FORGOTTEN, hint="No request may be in flight while weights change")

    @property
    def refuses(self) -> bool:
        """Whether ``refuse`` was called and ``accept`` was not."""
        return "add_request" in self.llm.llm_engine.__dict__

    def refuse(self, reason: str) -> None:
        """Have every request raise StateError. A paused scheduler would not do: ``generate`` would wait for it for ever."""

        def add_request(*_: Any, **__: Any) -> Any:
            raise StateError(reason, hint="The next publish() that succeeds heals it")

        self.llm.llm_engine.add_request = add_request

    def accept(self) -> None:
        """Take requests again; idempotent."""
        self.llm.llm_engine.__dict__.pop("add_request", None)


def names_of(engine: Any) -> AdapterNames:
    """The names of adapters in this process for vLLM's AsyncLLM or LLMEngine, made when they are first asked for."""
    if NAMES not in engine.__dict__:
        setattr(engine, NAMES, AdapterNames(engine.input_processor))
    names: AdapterNames = getattr(engine, NAMES)
    return names


def require_lora(config: Any) -> None:
    """Raise Unsupported for a configuration in which adapters of trainers cannot be served."""
    lora, parallel = getattr(config, "lora_config", None), config.parallel_config
    if lora is None:
        raise Unsupported(
            "this vLLM was started without LoRA, so it serves no adapters",
            hint=f"Start it with --enable-lora --max-loras 2 (enable_lora=True, max_loras=2). {MERGED_HINT}",
        )
    if may_sleep(config):
        raise Unsupported(
            "adapters of trainers and vLLM's sleep mode are not supported together",
            hint=f"Start vLLM without --enable-sleep-mode. {MERGED_HINT}",
        )
    if parallel.pipeline_parallel_size > 1:
        raise Unsupported(
            "adapters of trainers and pipeline parallelism are not supported together",
            hint=f"Start vLLM with --pipeline-parallel-size 1. {MERGED_HINT}",
        )
    if getattr(parallel, "_api_process_count", 1) > 1:
        raise Unsupported(
            "adapters of trainers and several API server processes are not supported together",
            hint=f"Start vLLM with --api-server-count 1. {MERGED_HINT}",
        )


NAMES = "_weightcast_names"
OLD = "adapters of trainers need vLLM 0.32 or later"
NOT_FORGOTTEN = "vLLM keeps keys and values that former weights computed"


def may_sleep(config: Any) -> bool:
    """Whether the engine was started with vLLM's sleep mode."""
    return bool(getattr(config.model_config, "enable_sleep_mode", False))


def require_sleep_mode(config: Any, engine: str | None = None) -> None:
    """Raise Unsupported where the engine was started without vLLM's sleep mode."""
    if not may_sleep(config):
        raise Unsupported(
            "this vLLM was started without sleep mode, so it cannot sleep",
            engine=engine,
            hint="Start it with --enable-sleep-mode (enable_sleep_mode=True), or publish without wake=",
        )


def has_backend(config: Any) -> bool:
    """Whether the engine was started with weightcast's weight transfer."""
    transfer = getattr(config, "weight_transfer_config", None)
    return transfer is not None and transfer.backend == BACKEND


def require_backend(config: Any) -> None:
    """Raise StateError where the workers do not know ``weightcast_call``: their raising would put their replies out of step."""
    if not has_backend(config):
        raise StateError(
            "this vLLM was not started with weightcast's weight transfer",
            hint='Start it with --weight-transfer-config \'{"backend": "weightcast"}\'',
        )
