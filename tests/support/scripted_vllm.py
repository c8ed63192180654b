"""Stand-ins for vLLM's engine objects: their calls as weightcast uses them, and workers that fail where they are told to.

A core does one thing after another, and what it was asked for it does, whether or not the caller still waits: as vLLM's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from weightcast.errors import StateError


class EngineDeadError(Exception):
    """As vLLM's: a process of the engine has ended."""


ERAS = ("0.26", "0.27", "0.32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a worker's next call of one kind ends."""

    kind: str = "LoadError"
    dirty: bool = False


@dataclass(slots=True, kw_only=True)
class ScriptedWorker:
    """A worker's answers to ``weightcast_call``. ``in_place``: what was committed cannot be taken back."""

    rank: int
    in_place: bool = False
    version: str = "default"
    dirty: bool = False
    held: bool = False
    asleep: tuple[str, ...] = ()
    """Tags of the memory that a sleep has unmapped."""
    error: str = ""
    fails: dict[str, Failure] = field(default_factory=dict)
    """By action, "commit" and "rollback" for the two kinds of update; each is used once."""
    num_updates: int = 0
    num_syncs: int = 0
    _before: tuple[int, str] | None = None
    """The round that is live, and the version before it."""

    def call(self, action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        name = payload.get("action", "") if action == "update" else action
        if name not in ("status", "hold"):
            self.error = self._carry_out(name, payload)
        elif name == "hold":
            self.held = bool(payload["held"])
        return {
            "rank": self.rank, "weight_version": self.version, "digest": "", "dirty": self.dirty, "held": self.held,
            "asleep": self.asleep,
            "num_syncs": self.num_syncs,
            "error": {"kind": self.error, "message": f"{name} failed"} if self.error else None,
        }  # fmt: skip

    def _carry_out(self, name: str, payload: Mapping[str, Any]) -> str:
        self.num_updates += name in ("commit", "rollback")
        failure = self.fails.pop(name, None)
        if failure is not None:
            self.dirty = self.dirty or failure.dirty
            return failure.kind
        if name == "commit" and (self._before is None or self._before[0] != payload["round"]):
            self._before, self.version, self.dirty = (payload["round"], self.version), payload["version"], False
            self.num_syncs += 1
        if name == "rollback" and self._before is not None and self._before[0] == payload["round"]:
            if self.in_place:
                return StateError.__name__
            self.version, self._before = self._before[1], None
        return ""


class ScriptedVllm:
    """An EngineClient, ``AsyncLLM`` or a server's: ``num_workers`` in each of ``num_replicas``, with the calls of one era."""

    def __init__(
        self, num_workers: int = 1, num_replicas: int = 1, *, era: str = ERAS[-1], in_place: bool = False
    ) -> None:
        self.workers = [ScriptedWorker(rank=rank, in_place=in_place) for rank in range(num_workers * num_replicas)]
        self.vllm_config = _config(num_workers, num_replicas)
        self.label = "default"
        self.calls: list[str] = []
        self.seconds: dict[str, float] = {}
        """How long the core takes for a call, by the call's name."""
        self.keeps_cache = False
        self.errored = False
        self.renderer = SimpleNamespace(clear_mm_cache_async=self._nothing)
        self._paused = [False] * num_replicas
        self._turn = asyncio.Lock()
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)
        if era == "0.32":
            self.engine_core.call_utility_all_async = self._ask_all
        else:
            self.engine_core._call_utility_async = self._ask
            self.engine_core.core_engines = list(range(num_replicas))
        if era != "0.26":
            self.update_weight_version = self._set_label

    @property
    def paused(self) -> bool:
        return all(self._paused)

    @property
    def versions(self) -> list[str]:
        return [worker.version for worker in self.workers]

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        await self._pause(mode=mode, clear_cache=clear_cache)

    async def resume_generation(self) -> None:
        await self._ask_all("resume")

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        await self._ask_all(f"forget running={reset_running_requests}")
        return not self.keeps_cache

    async def finish_weight_update(self) -> None:
        self.calls.append("finish")

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """As vLLM's: memory that is awake is not woken once more, and the scheduler goes on when nothing sleeps."""
        self.calls.append(f"wake {tags}")
        await asyncio.sleep(self.seconds.get("wake", 0))
        wake(self.workers, tags)
        if not any(worker.asleep for worker in self.workers):
            self._paused = [False] * len(self._paused)

    def fall_asleep(self, *more: str) -> None:
        """All memory of all workers; ``more`` are tags beside those that all versions have."""
        self._paused = [True] * len(self._paused)
        for worker in self.workers:
            worker.asleep = ("kv_cache", *more, "weights")

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> Any:
        """As vLLM's, which passes on the first replica's answers only."""
        return (await self._ask_all("collective_rpc", method, timeout, args, None))[0]

    async def _pause(self, *, mode: str, clear_cache: bool) -> None:
        await self._ask_all(f"pause {mode} clear={clear_cache}")
        if clear_cache and self.keeps_cache:
            raise RuntimeError("Failed to reset the KV connector cache.")

    async def _nothing(self) -> None:
        return

    async def _set_label(self, version: str) -> None:
        self.label = version

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        replicas = range(len(self._paused))
        return list(await asyncio.gather(*(self._ask(method, *arguments, engine=replica) for replica in replicas)))

    async def _ask(self, method: str, *arguments: Any, engine: int) -> Any:
        return await asyncio.shield(asyncio.ensure_future(self._in_turn(engine, method, arguments)))

    def die(self) -> None:
        """A process of the engine ends: what was asked is never answered, and what is asked is refused."""
        self.errored = True

    async def _in_turn(self, replica: int, method: str, arguments: tuple[Any, ...]) -> Any:
        if self.errored:
            raise EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        action, payload = arguments[2] if method == "collective_rpc" else (method, {})
        name = payload.get("action", action)
        if name not in ("status", "is_scheduler_paused"):
            self.calls.append(name)
        async with self._turn:
            if name.startswith("pause"):
                self._paused[replica] = True
            await asyncio.sleep(self.seconds.get(name.partition(" ")[0], 0))
            while self.errored:
                await asyncio.sleep(3600)
            if method == "collective_rpc":
                share = len(self.workers) // len(self._paused)
                return [w.call(action, payload) for w in self.workers[replica * share : (replica + 1) * share]]
            if name == "resume":
                self._paused[replica] = False
            return self._paused[replica]


class ScriptedLLM:
    """An ``LLM``: calls return when they are done, or wait for ``lets_go`` while that is not set."""

    def __init__(self, num_workers: int = 1, *, in_place: bool = False, computes_here: bool = False) -> None:
        self.workers = [ScriptedWorker(rank=rank, in_place=in_place) for rank in range(num_workers)]
        self.llm_engine = _LLMEngine(_config(num_workers, 1), computes_here)
        self.lets_go = threading.Event()
        self.lets_go.set()
        self.keeps_cache = False
        self.label = "default"
        self.threads: set[int] = set()

    def generate(self, prompt: str) -> str:
        self.llm_engine.add_request(prompt)
        return self.workers[0].version

    def get_world_size(self) -> int:
        return len(self.workers)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.threads.add(threading.get_ident())
        wake(self.workers, tags)

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        self.threads.add(threading.get_ident())
        self.lets_go.wait()
        return [worker.call(*args) for worker in self.workers]

    def reset_prefix_cache(self) -> bool:
        return not self.keeps_cache

    def update_weight_version(self, version: str) -> None:
        self.label = version


def wake(workers: Sequence[ScriptedWorker], tags: list[str] | None) -> None:
    """Map what sleeps of these tags, and whatever is of none that may be told apart. vLLM 0.26 maps what is awake a second time, which
    CUDA refuses."""
    for worker in workers:
        wanted = set(tags or worker.asleep)
        if not wanted <= set(worker.asleep):
            raise RuntimeError(f"CUDA Error: {wanted - set(worker.asleep)} is mapped already")
        worker.asleep = tuple(tag for tag in worker.asleep if tag in {"weights", "kv_cache"} - wanted)


class _LLMEngine:
    def __init__(self, vllm_config: Any, computes_here: bool) -> None:
        self.vllm_config = vllm_config
        self.requests: list[str] = []
        if computes_here:
            self.model_executor = SimpleNamespace(driver_worker=None)

    def add_request(self, prompt: str) -> None:
        self.requests.append(prompt)


def _config(num_workers: int, num_replicas: int) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=num_workers,
            world_size_across_dp=num_workers * num_replicas,
            data_parallel_size=num_replicas,
        ),
        weight_transfer_config=SimpleNamespace(backend="weightcast"),
        model_config=SimpleNamespace(model="scripted", enable_sleep_mode=False),
        cache_config=SimpleNamespace(num_gpu_blocks=4, block_size=16),
    )
