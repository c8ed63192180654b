"""EngineProcess: an engine without a language model behind real control routes, in a process of its own.

Everything that moves weights is the real thing: HTTP, control channel, transports, shadows, digests. Values are drawn from seeds,
so both sides know every byte without sending it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvicorn
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from weightcast.engines.base import EngineStatus
from weightcast.server.auth import TokenAuth
from weightcast.server.control import EngineCommitter
from weightcast.server.control_routes import control_router
from weightcast.server.run import bind, url_of
from weightcast.testing.faults import Action, Faults, MessageTrouble, MessyChannel
from weightcast.testing.footprint import Footprint
from weightcast.testing.local_engine import DictModel
from weightcast.testing.processes import Child
from weightcast.transports import shm
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine

T = TypeVar("T")
TOKEN = "a-token-for-tests"
SLICE_NBYTES = 64 * 2**10
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "embed": ((96, 128), torch.float32),
    "layers.0.weight": ((256, 1024), torch.float32),
    "layers.0.scale": ((7,), torch.bfloat16),
    "layers.1.weight": ((256, 513), torch.bfloat16),
    "norm": ((33,), torch.float32),
    "steps": ((), torch.int64),
}
LOADED = ("norm", "layers.1.weight")


def values_of(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tensors; equal for equal seeds, on any device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-(2**15), 2**15, shape, generator=generator).to(device, dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


class _Model(DictModel):
    """Its loader reaches a point of injection after its first tensor."""

    def __init__(self, faults: Faults, tensors: Mapping[str, torch.Tensor], **options: Any) -> None:
        super().__init__(tensors, **options)
        self._faults = faults

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for i, item in enumerate(tensors):
                if i == 1:
                    self._faults.hit("loader")
                yield item

        super().load_weights(watched())


class _Engine:
    """The part of InferenceEngine that the control routes use, over workers; one thread stands for the model's."""

    def __init__(self, workers: list[WeightcastEngine], faults: Faults) -> None:
        self._workers, self._faults = workers, faults
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._thread.submit(int).result()  # it is there from the start, so that counting threads finds leaks only
        self._paused = False
        self.num_syncs = 0

    async def _run(self, command: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(command))

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        def join() -> None:
            self._faults.hit("join")
            for worker in self._workers:
                worker.init_transfer_engine(worker.parse_init_info(init_info))

        await self._run(join)

    async def start_weight_update(self) -> None:
        def start() -> None:
            for worker in self._workers:
                worker.start_weight_update()

        await self._run(start)

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        def update() -> None:
            if update_info["action"] == "commit":
                self._faults.hit("commit:start")
            for worker in self._workers:
                worker.update_weights(worker.parse_update_info(update_info))
            if update_info["action"] == "commit":
                self._faults.hit("commit:end")

        await self._run(update)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        def finish() -> None:
            for worker in self._workers:
                worker.finish_weight_update(weight_version)
            self.num_syncs += 1

        await self._run(finish)

    async def shutdown_weight_transfer_engine(self) -> None:
        def leave() -> None:
            for worker in self._workers:
                worker.shutdown()

        await self._run(leave)

    async def pause_generation(self, mode: str = "abort", clear_cache: bool = True) -> None:
        self._paused = True

    async def resume_generation(self) -> None:
        self._paused = False

    async def is_paused(self) -> bool:
        return self._paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return True

    async def get_weight_version(self) -> str:
        return self._workers[0].weight_version

    async def checksums(self) -> dict[str, str]:
        return await self._run(self._workers[0].checksums)

    async def status(self) -> EngineStatus:
        first, dirty = self._workers[0], any(worker.dirty for worker in self._workers)
        return EngineStatus(
            model="tensors", weight_version=first.weight_version, digest=first.digest or None, ready=not dirty,
            reason="dirty" if dirty else "", dirty=dirty, paused=self._paused, num_running=0, num_waiting=0,
            num_kv_tokens=0, kv_capacity_tokens=0, num_generated_tokens=0, num_preemptions=0, num_syncs=self.num_syncs,
            world_size=len(self._workers), backend="weightcast",
        )  # fmt: skip


class EngineHost:
    """What lives in the process; EngineProcess calls its methods."""

    def __init__(
        self,
        mode: str,
        num_workers: int,
        loader: bool,
        relocatable: bool,
        device: str,
        checkpoint: str | None,
        host: str,
        port: int,
    ) -> None:
        shm.SLICE_NBYTES = SLICE_NBYTES
        self._faults = Faults()
        self._faults.install(gpu=device != "cpu")
        through = LOADED if loader else ()
        options = {"through_loader": through, "relocatable": relocatable, "device": device}
        self._device = device
        tensors = values_of(0, device) if checkpoint is None else load_file(Path(checkpoint) / "model.safetensors")
        self._models = [
            _Model(self._faults, tensors, rows=(rank, num_workers), **options) for rank in range(num_workers)
        ]
        self._workers = [
            WeightcastEngine(WeightTransferConfig(mode=mode), model, WorkerRank(rank=rank, world_size=num_workers))
            for rank, model in enumerate(self._models)
        ]
        self._engine = _Engine(self._workers, self._faults)
        self._messy: MessyChannel | None = None
        sock = bind(host, port)
        self._url = url_of(sock)
        app = Starlette(routes=[*self._routes(), *control_router(self._control(), TokenAuth(TOKEN)).routes])
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", loop="asyncio")
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._serving = threading.Thread(target=self._server.run, args=([sock],), name="http", daemon=True)
        self._serving.start()
        end = time.monotonic() + 20
        while not self._server.started:
            if time.monotonic() > end:
                raise TimeoutError("the routes were not served in 20 s")
            time.sleep(0.005)

    def _control(self) -> EngineCommitter:
        faults = self._faults

        class Committer(EngineCommitter):
            async def carry_out(self, order: Any) -> Any:
                answer = await super().carry_out(order)
                if order.action == "commit":
                    faults.hit("answer")
                return answer

        return Committer(self._engine)  # type: ignore[arg-type]

    def _routes(self) -> list[Route]:
        async def world_size(request: Request) -> Response:
            return JSONResponse({"world_size": len(self._workers)})

        async def health(request: Request) -> Response:
            status = await self._engine.status()
            return JSONResponse({"ready": status.ready}, 200 if status.ready else 503)

        return [Route("/get_world_size", world_size), Route("/health", health)]

    def url(self) -> str:
        return self._url

    def arm(self, point: str, action: Action, seconds: float) -> None:
        self._faults.arm(point, action, seconds)

    def disarm(self) -> None:
        self._faults.disarm()

    def reached(self, point: str) -> int:
        return self._faults.reached[point]

    def holds(self, seed: int) -> bool:
        """Whether every live byte is that of ``values_of(seed)``."""
        return all(model.holds(values_of(seed, self._device)) for model in self._models)

    def checksums(self) -> dict[str, str]:
        """Digest per live tensor; of an engine with one worker."""
        return self._models[0].checksums()

    def state(self) -> tuple[str, bool]:
        return self._workers[0].weight_version, any(worker.dirty for worker in self._workers)

    def num_syncs(self) -> int:
        """How many rounds went live here."""
        return self._engine.num_syncs

    def messy(self, trouble: MessageTrouble | None) -> None:
        """Trouble what the workers say, or (None) stop that."""
        if self._messy is not None:
            self._messy.__exit__()
        self._messy = None if trouble is None else MessyChannel(trouble).__enter__()

    def hang_up(self) -> None:
        """The HTTP server dies, the engine and its workers live."""
        self._server.should_exit = self._server.force_exit = True
        self._serving.join(10)

    def jump_clock(self, seconds: float) -> None:
        """The wall clock of this process jumps."""
        now = time.time
        time.time = lambda: now() + seconds

    def usage(self) -> dict[str, int]:
        """Descriptors and threads of the process."""
        now = Footprint.now()
        return {"descriptors": now.descriptors, "threads": now.threads}

    def footprint(self) -> tuple[int, int, int, int]:
        """All that the process holds; see testing.footprint."""
        now = Footprint.now()
        return now.descriptors, now.threads, now.segments, now.resident_nbytes


class EngineProcess(Child):
    """An engine at ``url``; ``mode`` is "staged" or "in_place". The same port can be given to its successor.

    It holds ``values_of(0)`` at first, or the tensors of a checkpoint folder.
    """

    def __init__(
        self,
        mode: str = "staged",
        *,
        num_workers: int = 1,
        loader: bool = False,
        relocatable: bool = True,
        device: str = "cpu",
        checkpoint: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        netns: str | None = None,
    ) -> None:
        self.options = {
            "num_workers": num_workers, "loader": loader, "relocatable": relocatable, "device": device,
            "checkpoint": checkpoint, "host": host, "netns": netns,
        }  # fmt: skip
        self.mode = mode
        super().__init__(
            EngineHost, mode, num_workers, loader, relocatable, device, checkpoint, host, port, netns=netns
        )
        self.url = str(self.call("url"))
        self.port = int(self.url.rpartition(":")[2])

    def arm(self, point: str, action: Action, seconds: float = 0.0) -> None:
        """Inject a fault at a point (see testing.faults), once."""
        self.call("arm", point, action, seconds)

    def wait_for(self, point: str, count: int, timeout_s: float = 10.0) -> None:
        """Return when a point was reached more than ``count`` times."""
        end = time.monotonic() + timeout_s
        while self.call("reached", point) <= count:
            if time.monotonic() > end:
                raise TimeoutError(f"{point} was not reached in {timeout_s:g} s")
            time.sleep(0.005)

    def successor(self) -> EngineProcess:
        """A new process at the same URL, with the weights an engine starts with. This one has to be dead."""
        return EngineProcess(self.mode, port=self.port, **self.options)  # type: ignore[arg-type]
