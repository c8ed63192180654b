"""EngineProcess: an engine without a language model behind real control routes, in a process of its own.

Everything that moves weights is the real thing: HTTP, control channel, transports, shadows, digests. Values are drawn from seeds,
so both sides know every byte without sending it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import uvicorn
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.bare_engine import BareEngine, FaultyModel, Snapshot
from tests.support.faults import Action, Faults, MessageTrouble, MessyChannel
from tests.support.footprint import Footprint
from tests.support.ports import HeldPort
from tests.support.processes import Child
from weightcast.server.auth import TokenAuth
from weightcast.server.control import EngineCommitter
from weightcast.server.control_routes import control_router
from weightcast.server.run import bind, url_of
from weightcast.transports import shm
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine

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


SPARSE = 10**6
"""Values of the seeds above this one differ from each other in few elements."""


def values_of(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tensors; equal for equal seeds, on any device."""
    generator = torch.Generator().manual_seed(seed)
    if seed > SPARSE:
        found = values_of(0)
        for value in found.values():
            where = torch.rand(value.shape, generator=generator) < 0.01
            value[where] = torch.randint(-(2**15), 2**15, (int(where.sum()),), generator=generator).to(value.dtype)
        return {name: value.to(device) for name, value in found.items()}
    return {
        name: torch.randint(-(2**15), 2**15, shape, generator=generator).to(device, dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


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
            FaultyModel(self._faults, tensors, rows=(rank, num_workers), **options) for rank in range(num_workers)
        ]
        self._workers = [
            WeightcastEngine(WeightTransferConfig(mode=mode), model, WorkerRank(rank=rank, world_size=num_workers))
            for rank, model in enumerate(self._models)
        ]
        self._engine = BareEngine(self._workers, self._models, self._faults)
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

        async def ready(request: Request) -> Response:
            status = await self._engine.status()
            return JSONResponse({"ready": status.ready}, 200 if status.ready else 503)

        return [Route("/get_world_size", world_size), Route("/ready", ready)]

    def url(self) -> str:
        return self._url

    def arm(self, point: str, action: Action, seconds: float, skip: int) -> None:
        self._faults.arm(point, action, seconds, skip)

    def disarm(self) -> None:
        self._faults.disarm()

    def reached(self, point: str) -> int:
        return self._faults.reached[point]

    def holds(self, seed: int) -> bool:
        """Whether every live byte is that of ``values_of(seed)``."""
        return self._engine.between_commits(lambda: self._engine.holds(values_of(seed, self._device)))

    def state(self) -> tuple[str, bool]:
        """The version that is live, and whether the engine is dirty."""
        now = self.snapshot({})
        return now.version, now.dirty

    def snapshot(self, seeds: Mapping[int, int], with_checksums: bool = False) -> Snapshot:
        """What the engine is between two commits: once one that runs now has ended. ``seeds`` says what each version holds."""

        def seen_as(version: str) -> dict[str, torch.Tensor] | None:
            seed = seeds.get(0 if version == "default" else int(version.partition("-")[0]))
            return None if seed is None else values_of(seed, self._device)

        return self._engine.between_commits(lambda: self._engine.snapshot(seen_as, with_checksums))

    def num_syncs(self) -> int:
        """How many rounds went live here."""
        return self._engine.num_syncs

    def messy(self, trouble: MessageTrouble | None) -> None:
        """Trouble what the workers say, or (None) stop that."""
        if self._messy is not None:
            self._messy.__exit__()
        self._messy = None if trouble is None else MessyChannel(trouble).__enter__()

    def hang_up(self) -> None:
        """The HTTP server dies, with whatever it was about to answer; the engine and its workers live."""

        def die() -> None:
            for listening in self._server.servers:
                listening.close()
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()

        self._server.servers[0].get_loop().call_soon_threadsafe(die)
        self._server.should_exit = self._server.force_exit = True
        self._serving.join(10)

    def jump_clock(self, seconds: float) -> None:
        """The wall clock of this process jumps."""
        now = time.time
        time.time = lambda: now() + seconds

    def footprint(self) -> Footprint:
        """All that the process holds."""
        return Footprint.now()


class EngineProcess(Child):
    """An engine at ``url``; ``mode`` is "staged" or "in_place". Its successor gets the same port, which is held meanwhile.

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
        netns: str | None = None,
        held: HeldPort | None = None,
        port: int = 0,
    ) -> None:
        self.options = {
            "num_workers": num_workers, "loader": loader, "relocatable": relocatable, "device": device,
            "checkpoint": checkpoint, "host": host, "netns": netns,
        }  # fmt: skip
        self.mode = mode
        # An address in another network cannot be bound here, and nobody else is there.
        self._held = HeldPort(host) if held is None and netns is None else held
        port = self._held.number if self._held is not None else port
        try:
            super().__init__(
                EngineHost, mode, num_workers, loader, relocatable, device, checkpoint, host, port, netns=netns
            )
        except BaseException:
            self._let_go()
            raise
        try:
            self.url = str(self.call("url", timeout_s=60.0))
        except BaseException:
            self.close()
            raise
        self.port = int(self.url.rpartition(":")[2])

    def arm(self, point: str, action: Action, seconds: float = 0.0, skip: int = 0) -> None:
        """Inject a fault at a point (see testing.faults), once."""
        self.call("arm", point, action, seconds, skip)

    def snapshot(self, seeds: Mapping[int, int]) -> Snapshot:
        """What the engine is between two commits; ``seeds`` says which values each version's number stands for."""
        now = self.call("snapshot", dict(seeds))
        assert isinstance(now, Snapshot)
        return now

    def wait_for(self, point: str, count: int, timeout_s: float = 20.0) -> None:
        """Return when a point was reached more than ``count`` times."""
        end = time.monotonic() + timeout_s
        while self.call("reached", point) <= count:
            if time.monotonic() > end:
                raise TimeoutError(f"{point} was not reached in {timeout_s:g} s")
            time.sleep(0.005)

    def successor(self) -> EngineProcess:
        """A new process at the same URL, with the weights an engine starts with. This one has to be dead."""
        held, self._held = self._held, None
        return EngineProcess(self.mode, held=held, port=self.port, **self.options)  # type: ignore[arg-type]

    def close(self) -> None:
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
