"""Several trainer ranks on one GPU: a worker takes every byte from whichever rank holds it, over cuda_ipc and nccl."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from queued import queued_digests
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from weightcast import Publisher
from weightcast.errors import WeightcastError
from weightcast.report.model import Report
from weightcast.testing.peer_engine import PeerEngine
from weightcast.testing.ranks import Peer

pytest.importorskip("triton", reason="needs a CUDA build of torch")

DEVICE, PULL, PUSH = "cuda", "cuda_ipc", "nccl"
SHAPES = {"rows": (1001, 513), "columns": (640, 1030), "tiny": (1, 3), "replica": (64, 64), "plain": (4097,)}
CUTS = {"rows": Shard(0), "columns": Shard(1), "tiny": Shard(0), "replica": Replicate()}
TIMEOUT_S = 40.0


def whole(seed: int) -> dict[str, torch.Tensor]:
    """The same random values in every process."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class TrainerRank:
    """One rank; rank 0 lives in the test's process, the others each in one of their own."""

    def __init__(self) -> None:
        os.environ["NCCL_HOSTID"] = f"rank-{os.getpid()}"

    def start(self, rank: int, size: int, folder: str) -> None:
        self.rank, self.size = rank, size
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        self.mesh = DeviceMesh(DEVICE, list(range(size)))
        self.held = {name: self._part(name, value) for name, value in whole(0).items() if self._holds(name)}

    def join(self, transport: str, mode: str, engines: tuple[PeerEngine, ...] = (), as_module: bool = False) -> None:
        """``as_module``: publish parameters from where they are, not a mapping that is copied."""
        if as_module:
            module = nn.ParameterDict(self.held)
            self.held = dict(module.items())
        self.publisher = Publisher(
            module if as_module else self.held,
            engines,
            process_group=dist.group.WORLD,
            transport=transport,
            mode=mode,
            timeout_s=TIMEOUT_S,
        )

    @torch.no_grad()
    def write(self, seed: int) -> None:
        """Values of a seed, to where the old ones are."""
        for name, value in self.held.items():
            fresh = self._part(name, whole(seed)[name])
            local, new = (v.to_local() if isinstance(v, DTensor) else v for v in (value, fresh))
            local.copy_(new)

    def publish(self, seed: int, timeout_s: float | None = None) -> Report:
        """Values of a seed."""
        self.write(seed)
        return self.publisher.publish(timeout_s=timeout_s)

    def publish_prepared(self, seed: int) -> tuple[Report, int, int]:
        """The same after ``prepare``; also how many digests either of them has queued."""
        with queued_digests() as queued:
            self.write(seed)
            self.publisher.prepare()
            began = len(queued)
            return self.publisher.publish(), began, len(queued) - began

    def told(self, seed: int, timeout_s: float) -> tuple[str, str]:
        """Kind and text of the error that a publish ends with, or nothing."""
        try:
            self.publish(seed, timeout_s)
        except WeightcastError as error:
            return type(error).__name__, str(error)
        return "", ""

    def leave(self) -> None:
        self.publisher.close()

    def _holds(self, name: str) -> bool:
        return name in CUTS or self.rank == self.size - 1

    def _part(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in CUTS:
            return value.to(DEVICE)
        shape, offsets = compute_local_shape_and_global_offset(value.shape, self.mesh, [CUTS[name]])
        part = value
        for dim, (start, size) in enumerate(zip(offsets, shape, strict=True)):
            part = part.narrow(dim, min(start, part.shape[dim]), size)
        return DTensor.from_local(
            part.contiguous().to(DEVICE), self.mesh, [CUTS[name]], shape=value.shape, stride=value.stride()
        )


@contextmanager
def trainer_ranks(size: int, folder: Path) -> Iterator[tuple[TrainerRank, list[Peer]]]:
    with ExitStack() as stack:
        others = [stack.enter_context(Peer(TrainerRank, rank)) for rank in range(1, size)]
        for rank, other in enumerate(others, 1):
            other.start("start", rank, size, str(folder))
        own = TrainerRank()
        own.start(0, size, str(folder))
        stack.callback(dist.destroy_process_group)
        for other in others:
            other.result(60)
        yield own, others


def contents(seed: int) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in whole(seed).items()}


def fresh_seed() -> int:
    return random.SystemRandom().randrange(1, 2**31)


def test_each_rank_may_prepare_its_part(tmp_path: Path) -> None:
    if DEVICE != "cuda":
        pytest.skip("a CPU queues nothing")
    with PeerEngine() as engine, trainer_ranks(2, tmp_path) as (own, (other,)):
        engine.build({name: (shape, "float32") for name, shape in SHAPES.items()}, mode="in_place", device=DEVICE)
        other.start("join", PULL, "in_place", (), True)
        own.join(PULL, "in_place", (engine,), as_module=True)
        other.result(60)
        seed = fresh_seed()
        other.start("publish", seed)
        own.publish(seed)
        other.result(60)
        for prepared in (False, True, True, False):
            seed = fresh_seed()
            other.start("publish_prepared" if prepared else "publish", seed)
            report, began, again = own.publish_prepared(seed)
            assert report.digests_match
            assert began > again == 0
            if prepared:
                _, began, again = other.result(60)
                assert began > again == 0
            else:
                other.result(60)
            assert engine.peer.call("contents") == contents(seed)
        other.start("leave")
        own.leave()
        other.result(60)


@pytest.mark.parametrize("transport", [PULL, PUSH])
@pytest.mark.parametrize("size", [2, 3])
def test_every_byte_arrives_from_whoever_holds_it(tmp_path: Path, transport: str, size: int) -> None:
    with PeerEngine() as engine, trainer_ranks(size, tmp_path) as (own, others):
        for mode in ("in_place", "staged"):
            engine.build({name: (shape, "float32") for name, shape in SHAPES.items()}, mode=mode, device=DEVICE)
            for other in others:
                other.start("join", transport, mode)
            own.join(transport, mode, (engine,))
            for other in others:
                other.result(60)
            for _ in range(3):
                seed = fresh_seed()
                for other in others:
                    other.start("publish", seed)
                report = own.publish(seed)
                reports = [other.result(60) for other in others]
                assert report.digests_match
                assert {told.version for told in reports} == {report.version}
                assert report.engines[0].workers[0].transport == transport
                assert engine.peer.call("contents") == contents(seed)
            for other in others:
                other.start("leave")
            own.leave()
            for other in others:
                other.result(60)


@pytest.mark.parametrize("transport", [PULL, PUSH])
def test_a_rank_that_is_gone_is_named_and_the_engine_stays_as_it_was(tmp_path: Path, transport: str) -> None:
    seed = fresh_seed()
    with PeerEngine() as engine, trainer_ranks(2, tmp_path) as (own, (other,)):
        engine.build({name: (shape, "float32") for name, shape in SHAPES.items()}, mode="staged", device=DEVICE)
        other.start("join", transport, "staged")
        own.join(transport, "staged", (engine,))
        other.result(60)
        other.start("publish", seed)
        own.publish(seed)
        other.result(60)
        other.kill()
        kind, text = own.told(seed + 1, 10.0)
        assert kind in ("RoundFailed", "PeerLost")
        assert "trainer rank 1 is gone" in text
        assert engine.peer.call("contents") == contents(seed)
        own.leave()
