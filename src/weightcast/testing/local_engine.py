"""LocalEngine: workers without an inference engine, for tests of everything between trainer and live weights. No HTTP, no model code.

Each worker holds its parameters in a ``DictModel`` and has a real WeightcastEngine. Control channel, transports, plans, shadows and
digests are therefore the real ones; only generation is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import torch

from weightcast.content.layout_digest import digest_tensor
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, LoadError, PlanMismatch, WeightcastError
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, align
from weightcast.manifest.dtypes import name_of
from weightcast.receiver.base import LiveModel
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine


class DictModel(LiveModel):
    """Named parameters in one arena, in the order of their names.

    Args:
        rows: (rank, world_size). Tensors whose dimension 0 is divisible by world_size keep only the rank's slice of that dimension, as
            in a tensor-parallel worker.
        through_loader: names of tensors that the model's loader copies.
        tied: maps a name to the tensor in whose memory that name lies.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        rows: tuple[int, int] = (0, 1),
        relocatable: bool = True,
        through_loader: Sequence[str] = (),
        tied: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.relocatable = relocatable
        self._through = tuple(through_loader)
        self._rows = rows
        self.cut: set[str] = set()
        """Names of which this worker has only some rows."""
        placements, end = [], 0
        self._loaded = {name: tensors[name].clone().to(self.device) for name in self._through}
        self.initial = {name: value.clone() for name, value in self._loaded.items()}
        self.fail_load: Exception | None = None
        for name, value in sorted(tensors.items()):
            if name in self._through:
                continue
            region = self._region(name, tuple(value.shape))
            if region.sizes != tuple(value.shape):
                self.cut.add(name)
            itemsize = value.element_size()
            placements.append(
                Placement(
                    region=region,
                    dtype=name_of(value.dtype),
                    storage=0,
                    offset=end // itemsize,
                    strides=contiguous_strides(region.sizes),
                )
            )
            end = align(end + region.numel * itemsize)
        of_name = {placement.region.name: placement for placement in placements}
        for name, other in (tied or {}).items():
            region = msgspec.structs.replace(of_name[other].region, name=name)
            placements.append(msgspec.structs.replace(of_name[other], region=region))
        self._layout = Layout(placements=tuple(placements), storage_nbytes=(end,), through_loader=self._through)
        self._memory = Memory([torch.zeros(end, dtype=torch.uint8, device=self.device)], is_arena=True)
        for name, value in self.parameters().items():
            if name in tensors:
                value.copy_(self._slice(name, tensors[name]))

    def _region(self, name: str, shape: tuple[int, ...]) -> Region:
        rank, world_size = self._rows
        if not shape or shape[0] % world_size:
            return Region(name=name, offsets=(0,) * len(shape), sizes=shape)
        size = shape[0] // world_size
        return Region(name=name, offsets=(rank * size, *((0,) * (len(shape) - 1))), sizes=(size, *shape[1:]))

    def _slice(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        for placement in self._layout.placements:
            if placement.region.name == name:
                for dim, (start, size) in enumerate(zip(placement.region.offsets, placement.region.sizes, strict=True)):
                    whole = whole.narrow(dim, start, size)
        return whole

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the live values of this worker's slices, by name."""
        found = {
            p.region.name: self._memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides)
            for p in self._layout.placements
        }
        return found | self._loaded

    def holds(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether every live byte equals the byte of the given checkpoint."""
        live = self.parameters()
        return all(
            torch.equal(
                live[name].contiguous().reshape(-1).view(torch.uint8),
                self._slice(name, value).to(live[name].dtype).contiguous().reshape(-1).view(torch.uint8),
            )
            for name, value in tensors.items()
        )

    def layout(self, manifest: Manifest) -> Layout:
        for name in self.parameters():
            if name not in manifest:
                raise PlanMismatch(f"the trainer does not publish {name!r}")
        return self._layout

    def memory(self) -> Memory:
        return self._memory

    def rebind(self, memory: Memory) -> None:
        self._memory = memory

    def unknown(self, names: Sequence[str]) -> Sequence[str]:
        known = self.parameters()
        return [name for name in names if name not in known]

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, value in tensors:
            self._loaded[name].copy_(value)
            if self.fail_load is not None:
                error, self.fail_load = self.fail_load, None
                raise LoadError(str(error)) from error

    def load_initial(self) -> None:
        self.load_weights(iter(self.initial.items()))

    def checksums(self) -> dict[str, str]:
        return {name: f"{digest_tensor(value):016x}" for name, value in self.parameters().items()}


class LocalEngine(EngineClient):
    """An engine in this process that has one worker for each of ``models``.

    Each call of the engine begins with ``before(phase)``: a test raises or sleeps there to inject a fault. With ``side_by_side`` the
    workers commit at the same time, as workers with processes of their own do, and not one after the other.
    """

    kind = "local"
    host = "127.0.0.1"

    def __init__(
        self, name: str, models: Sequence[DictModel], *, mode: str = "auto", side_by_side: bool = False
    ) -> None:
        self.name, self._side_by_side = name, side_by_side
        self.models = list(models)
        config = WeightTransferConfig(mode=mode)
        size = len(self.models)
        self.workers = [
            WeightcastEngine(config, model, WorkerRank(rank=rank, world_size=size))
            for rank, model in enumerate(self.models)
        ]
        self.before: Callable[[str], None] = lambda phase: None

    def refuse(self, *phases: str) -> None:
        """Answer the calls of these phases with an EngineError from now on. Without phases the engine works again."""

        def before(phase: str) -> None:
            if phase in phases:
                raise EngineError(f"no {phase} today")

        self.before = before

    def world_size(self, deadline: Deadline) -> int:
        self.before("world_size")
        return len(self.workers)

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self.before("init")
        for worker in self.workers:
            worker.init_transfer_engine(worker.parse_init_info(init_info))

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        self.before("commit")
        start = time.perf_counter()
        self._update({"epoch": order.epoch, "round": order.round, "action": "commit"}, deadline, order.version)
        return CommitReply(phases={"apply": time.perf_counter() - start})

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self.before("rollback")
        self._update({"epoch": epoch, "round": round, "action": "rollback"}, deadline, None)

    def _update(self, info: dict[str, Any], deadline: Deadline, version: str | None) -> None:
        info["timeout_s"] = deadline.limit_s()
        errors: list[WeightcastError] = []

        def update(worker: WeightcastEngine) -> None:
            try:
                worker.start_weight_update()
                worker.update_weights(worker.parse_update_info(info))
                worker.finish_weight_update(version)
            except WeightcastError as error:
                errors.append(error)

        if self._side_by_side:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                list(pool.map(update, self.workers))
        else:
            for worker in self.workers:
                update(worker)
        if errors:
            raise errors[0]

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        self.before("status")
        first = self.workers[0]
        served = {(worker.weight_version, worker.digest) for worker in self.workers}
        return {
            "weight_version": first.weight_version,
            "digest": first.digest or None,
            # Workers that part ways are as bad as one that is half written: the engine as a whole serves no version.
            "dirty": any(worker.dirty for worker in self.workers) or len(served) > 1,
            "ready": True,
        }

    def stop(self) -> None:
        """Leave the trainer."""
        for worker in self.workers:
            worker.shutdown()
