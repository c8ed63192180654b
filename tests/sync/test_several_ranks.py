"""Several trainer ranks in one Publisher: every byte arrives from whoever holds it, and nobody waits for the dead.

Rank 0 has the engines; each rank seeds its values alike, shards them and forgets what is not its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.shared_tcp import SharingTcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from weightcast import Publisher
from weightcast.content.expected import ExpectedDigest
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, WeightcastError
from weightcast.report.model import Report
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import Peer, run_ranks
from weightcast.transports.registry import registry
from weightcast.transports.tcp import TcpTrainerEnd

Case = tuple[str, str, str, int, "torch.dtype | None", "torch.dtype | None"]
"""Transport, mode, kind of source, workers, the workers' dtype and the published one where they are not the trainer's."""
Told = tuple[str, str, float]
"""Name and text of the error of a call (or no name, and a version), and the seconds it took."""
SHAPES = {"rows": (7, 5), "columns": (6, 9), "tiny": (1, 3), "replica": (4, 4), "plain": (11,), "grid": (5, 6)}
TIMEOUT_S = 20.0


@contextmanager
def process_group(rank: int, size: int, folder: str) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def checkpoint(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The same random values on every rank that asks for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def sharded(whole: dict[str, torch.Tensor], size: int, rank: int) -> dict[str, torch.Tensor]:
    """Uneven rows, columns, a tensor that not all ranks have a part of, replicas, one that only the last rank has."""
    mesh = init_device_mesh("cpu", (size,))
    placements = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "tiny": [Shard(0)],
        "replica": [Replicate()],
        "grid": [Shard(1)],
    }
    held: dict[str, torch.Tensor] = {
        name: distribute_tensor(whole[name], mesh, placement) for name, placement in placements.items()
    }
    if rank == size - 1:
        held["plain"] = whole["plain"].clone()
    return held


def sharded_local(whole: dict[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's part of whole values, cut without talking to other ranks."""
    cut = {}
    for name, value in like.items():
        if isinstance(value, DTensor):
            shape, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            part = whole[name]
            for dim, (start, size) in enumerate(zip(offsets, shape, strict=True)):
                part = part.narrow(dim, min(start, part.shape[dim]), size)
            cut[name] = part
        else:
            cut[name] = whole[name]
    return cut


def wait_for(path: Path) -> None:
    deadline = Deadline(20)
    while not path.exists():
        deadline.check(f"waiting for {path.name}")
        time.sleep(0.02)


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def overwrite(held: Mapping[str, torch.Tensor], fresh: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in fresh.items():
            local(held[name]).copy_(local(value))


def agreed_seed() -> int:
    """A fresh random number that is the same on all ranks."""
    number = torch.randint(1, 2**31, ())
    dist.broadcast(number, 0)
    return int(number)


def three_rounds(
    held: Mapping[str, torch.Tensor],
    source: nn.Module | dict[str, torch.Tensor],
    fresh: Callable[[int], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]],
    *,
    transport: str,
    mode: str,
    workers: int,
    dtype: torch.dtype | None,
    published: torch.dtype | None = None,
) -> list[str]:
    """Publish three times and compare every live byte on rank 0. ``fresh(seed)`` gives whole values and this rank's part."""
    seed, rank = agreed_seed(), dist.get_rank()
    models: list[DictModel] = []
    start = {n: v if dtype is None else v.to(dtype) for n, v in fresh(seed)[0].items()}
    if rank == 0:
        models = [DictModel(start, rows=(i, workers)) for i in range(workers)]
    engines = [LocalEngine("a", models)] if rank == 0 else []
    late = LocalEngine("b", [DictModel(start, rows=(i, 3)) for i in range(3)] if rank == 0 else [])
    versions = []
    try:
        with Publisher(
            source,
            engines,
            process_group=dist.group.WORLD,
            dtype=published,
            transport=transport,
            mode=mode,
            timeout_s=TIMEOUT_S,
        ) as publisher:
            publisher.connect()
            for number in (1, 2, 3):
                whole, mine = fresh(seed + number)
                overwrite(held, mine)
                if published is not None:
                    whole = {name: value.to(published) for name, value in whole.items()}
                report = publisher.publish()
                assert report.number == number
                assert report.digests_match
                assert report.mode == mode
                assert {w.transport for e in report.engines for w in e.workers} == {transport}
                assert all(model.holds(whole) for model in models)
                assert publisher.last_report == report
                versions.append(report.version)
                if number == 1:
                    expected = set(publisher._part.expected)
                    caught_up = publisher.add(late)
                    assert caught_up is not None
                    assert caught_up.version == report.version
                    models += late.models
                    assert all(model.holds(whole) for model in models)
            assert set(publisher._part.expected) >= expected
            publisher.remove("b")
            assert set(publisher._part.expected) == expected, "nothing is digested for those who left"
    finally:
        for engine in [*engines, late]:
            engine.stop()
    return versions


def as_module(held: Mapping[str, torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for name, value in held.items():
        module.register_parameter(name, nn.Parameter(value))
    return module


def publish_in_every_way(rank: int, size: int, folder: str, cases: list[Case]) -> list[list[str]]:
    with process_group(rank, size, folder):
        told = []
        registry().register(SharingTcp.name, SharingTcp)
        for transport, mode, kind, workers, dtype, published in cases:

            def fresh(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
                whole = checkpoint(seed)
                return whole, sharded(whole, size, rank)

            held = fresh(agreed_seed())[1]
            source = as_module(held) if kind == "module" else held
            told.append(
                three_rounds(
                    held,
                    source,
                    fresh,
                    transport=transport,
                    mode=mode,
                    workers=workers,
                    dtype=dtype,
                    published=published,
                )
            )
        return told


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (
            2,
            [
                ("shm", "staged", "module", 1, None, None),
                ("tcp", "staged", "state dict", 2, None, None),
                ("shared_tcp", "staged", "module", 1, None, None),
                ("shm", "in_place", "state dict", 1, torch.bfloat16, None),
                ("tcp", "in_place", "module", 1, torch.bfloat16, None),
                ("shm", "staged", "module", 2, None, torch.bfloat16),
                ("shm", "in_place", "state dict", 1, None, torch.float16),
                ("tcp", "staged", "state dict", 1, torch.float16, torch.bfloat16),
                ("tcp", "in_place", "module", 2, None, torch.bfloat16),
            ],
        ),
        (
            3,
            [
                ("tcp", "staged", "module", 2, torch.bfloat16, None),
                ("shared_tcp", "staged", "module", 1, torch.bfloat16, None),
                ("shm", "in_place", "module", 1, None, None),
                ("shared_tcp", "staged", "module", 1, None, torch.bfloat16),
            ],
        ),
    ],
)
def test_every_byte_arrives_from_whoever_holds_it(tmp_path: Path, size: int, cases: list[Case]) -> None:
    told = run_ranks(publish_in_every_way, size, str(tmp_path), cases)
    assert all(versions == told[0] for versions in told)
    for versions in told[0]:
        assert [version.partition("-")[0] for version in versions] == ["1", "2", "3"]
        assert len({version.partition("-")[2] for version in versions}) == 3


def publish_trained(rank: int, size: int, folder: str) -> list[list[str]]:
    """FSDP2 over two ranks while it trains, and a grid of two by two ranks that cuts both dimensions or keeps replicas."""
    told = []
    with process_group(rank, size, folder):
        seed = agreed_seed()
        told += [train_and_publish(seed, "shm"), train_and_publish(seed + 1, "tcp")]
        told += [train_and_publish(seed, "shm", torch.bfloat16), train_and_publish(seed + 1, "tcp", torch.float16)]
        mesh = init_device_mesh("cpu", (2, 2))
        ways = {
            "both": [Shard(0), Shard(1)],
            "other": [Shard(1), Shard(0)],
            "same": [Shard(0), Shard(0)],
            "hybrid": [Replicate(), Shard(0)],
            "columns": [Shard(1), Replicate()],
        }

        def fresh(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            whole = {name: torch.randn((7, 5), generator=generator) for name in ways}
            return whole, {name: distribute_tensor(value, mesh, ways[name]) for name, value in whole.items()}

        held = fresh(agreed_seed())[1]
        told.append(three_rounds(held, held, fresh, transport="tcp", mode="staged", workers=2, dtype=None))
    return told


def train_and_publish(seed: int, transport: str, published: torch.dtype = torch.float32) -> list[str]:
    """The engine is in float32, whatever is published."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    engines = [LocalEngine("a", [DictModel(whole)])] if dist.get_rank() == 0 else []
    versions = []
    try:
        with Publisher(
            model,
            engines,
            process_group=dist.group.WORLD,
            dtype=published,
            transport=transport,
            timeout_s=TIMEOUT_S,
        ) as publisher:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 5)).square().sum().backward()
                optimizer.step()
                report = publisher.publish()
                whole = {name: value.full_tensor().to(published) for name, value in model.state_dict().items()}
                assert report.digests_match
                assert all(engine.models[0].holds(whole) for engine in engines)
                versions.append(report.version)
    finally:
        for engine in engines:
            engine.stop()
    return versions


def test_fsdp_trains_on_and_grids_of_ranks_are_exact(tmp_path: Path) -> None:
    told = run_ranks(publish_trained, 4, str(tmp_path))
    assert all(versions == told[0] for versions in told)
    assert all(len(set(versions)) == 3 for versions in told[0])


class Side:
    """One rank in a process of its own, to be frozen or killed."""

    def start(self, rank: int, size: int, folder: str, transport: str, seed: int, mode: str) -> None:
        store = dist.FileStore(f"{folder}/store", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        self.rank, self.size = rank, size
        self.held = sharded(checkpoint(seed), size, rank)
        self.engines = [LocalEngine("a", [DictModel(checkpoint(seed - 1))])] if rank == 0 else []
        self.publisher = Publisher(
            self.held, self.engines, process_group=dist.group.WORLD, transport=transport, mode=mode, timeout_s=20
        )

    def connect(self, timeout_s: float = 20.0) -> Told:
        return self._told(lambda: self.publisher.connect(timeout_s))

    def publish(self, timeout_s: float, seed: int = 0) -> Told:
        """What a publish of fresh values came to."""
        if seed:
            overwrite(self.held, sharded_local(checkpoint(seed), self.held))
        return self._told(lambda: self.publisher.publish(timeout_s=timeout_s))

    @staticmethod
    def _told(call: Callable[[], Report | None]) -> Told:
        start = time.monotonic()
        try:
            report = call()
        except WeightcastError as error:
            return type(error).__name__, str(error), time.monotonic() - start
        return "", report.version if report else "", time.monotonic() - start

    def stall(self, what: str, folder: str) -> None:
        """From now on this rank sends or digests nothing, and leaves a mark when it would have."""

        def never(*_: object, **__: object) -> int:
            Path(folder, "stalled").touch()
            time.sleep(60)
            return 0

        if what == "send":
            TcpTrainerEnd.send = never  # type: ignore[method-assign]
        else:
            ExpectedDigest.of = never  # type: ignore[method-assign]

    def serves(self, seed: int) -> tuple[bool, str]:
        """Whether the engine's live bytes are those of a seed, and the version it names."""
        (engine,) = self.engines
        return engine.models[0].holds(checkpoint(seed)), engine.workers[0].weight_version

    def close(self) -> float:
        start = time.monotonic()
        self.publisher.close()
        for engine in self.engines:
            engine.stop()
        return time.monotonic() - start


@contextmanager
def sides(size: int, folder: Path, transport: str, seed: int, mode: str = "staged") -> Iterator[list[Peer]]:
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(Side, rank)) for rank in range(size)]
        for rank, peer in enumerate(peers):
            peer.start("start", rank, size, str(folder), transport, seed, mode)
        for peer in peers:
            peer.result()
        yield peers


def all_call(peers: list[Peer], method: str, *args: object) -> list[Told]:
    for peer in peers:
        peer.start(method, *args)
    return [peer.result(40) for peer in peers]


@pytest.mark.parametrize(
    ("transport", "mode", "stalled"),
    [("tcp", "staged", "send"), ("tcp", "in_place", "send"), ("shm", "staged", "digest")],
)
def test_a_rank_that_is_killed_in_a_round_is_named_on_all_others(
    tmp_path: Path, transport: str, mode: str, stalled: str
) -> None:
    seed = random.SystemRandom().randrange(1, 2**31)
    with sides(3, tmp_path, transport, seed, mode) as peers:
        told = all_call(peers, "publish", 20.0, seed)
        assert {kind for kind, _, _ in told} == {""}
        assert len({version for _, version, _ in told}) == 1
        version = told[0][1]
        peers[2].call("stall", stalled, str(tmp_path))
        for peer in peers:
            peer.start("publish", 10.0, seed + 1)
        wait_for(tmp_path / "stalled")
        peers[2].kill()
        for peer in peers[:2]:
            kind, text, seconds = peer.result(20)
            assert kind == "RoundFailed"
            assert "trainer rank 2 is gone" in text
            assert "Start that rank again" in text
            assert (f"a serves {version}" if mode == "staged" else "a is DIRTY") in text
            assert seconds < 10
        if mode == "staged":
            assert peers[0].call("serves", seed) == (True, version)
        for kind, text, seconds in all_call(peers[:2], "publish", 10.0, seed + 1):
            assert kind == "PeerLost"
            assert "trainer rank 2 is gone" in text
            assert seconds < 5
        assert max(all_call(peers[:2], "close")) < 5  # type: ignore[type-var]


def test_a_late_rank_and_a_frozen_one_are_named_by_the_deadline_and_calls_stay_in_step(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1, 2**31)
    with sides(2, tmp_path, "tcp", seed) as (leader, follower):
        assert {kind for kind, _, _ in all_call([leader, follower], "publish", 20.0, seed)} == {""}
        kind, text, seconds = leader.call("publish", 1.0, seed + 1)
        assert kind == "DeadlineExceeded"
        assert "trainer rank 1 did not answer" in text
        assert "Every rank has to call connect() and publish(), in the same order" in text
        assert seconds < 3
        kind, text, seconds = follower.call("publish", 5.0, seed + 1)
        assert kind == "DeadlineExceeded"
        assert "trainer rank 1 did not answer" in text
        assert "Every rank has to call connect() and publish(), in the same order" in text
        assert seconds < 2
        kind, text, seconds = follower.call("publish", 1.0, seed + 2)
        assert kind == "DeadlineExceeded"
        assert "trainer rank 0 did not end publish()" in text
        assert "Every rank has to call connect() and publish(), in the same order" in text
        assert seconds < 4
        kind, text, _ = leader.call("publish", 5.0, seed + 2)
        assert kind == "StateError"
        assert "trainer rank 1: this rank has left the call" in text
        assert "Every rank has to call connect() and publish(), in the same order" in text
        leader.start("publish", 5.0)
        kind, text, _ = follower.call("connect")
        assert kind == leader.result()[0] == "StateError"
        assert "it calls connect(), rank 0 calls publish()" in text
        assert "Every rank has to call connect() and publish(), in the same order" in text
        assert [kind for kind, _, _ in all_call([leader, follower], "publish", 20.0, seed + 3)] == ["", ""]
        assert leader.call("serves", seed + 3)[0]
        follower.freeze()
        kind, text, seconds = leader.call("publish", 2.0, seed + 4)
        assert kind == "DeadlineExceeded"
        assert "trainer rank 1" in text
        assert seconds < 4
        follower.kill()
        assert leader.call("close") < 5


def test_followers_learn_that_rank_0_is_gone(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1, 2**31)
    with sides(2, tmp_path, "shm", seed) as (leader, follower):
        assert {kind for kind, _, _ in all_call([leader, follower], "connect")} == {""}
        follower.start("publish", 10.0, seed)
        leader.kill()
        kind, text, seconds = follower.result()
        assert kind == "PeerLost"
        assert "trainer rank 0 is gone" in text
        assert "Start that rank again, then make a new Publisher on every rank" in text
        assert seconds < 5


def refusals(rank: int, size: int, folder: str) -> list[tuple[str, str]]:
    """What sources that cannot be published come to."""
    with process_group(rank, size, folder) as group:
        mesh = init_device_mesh("cpu", (size,))
        whole = torch.randn(6, 4)
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        told = []
        strided = DTensor.from_local(torch.randn(3, 4), mesh, [_StridedShard(0, split_factor=2)])
        partial = DTensor.from_local(torch.randn(6, 4), mesh, [Partial()])
        for source in (
            {"w": strided},
            {"w": partial},
            {"w": rows if rank else rows.to(torch.bfloat16)},
            {"w": rows if rank else whole},
        ):
            try:
                with Publisher(source, process_group=group, timeout_s=TIMEOUT_S) as publisher:
                    publisher.connect()
                told.append(("", ""))
            except WeightcastError as error:
                told.append((type(error).__name__, str(error)))
        for source in (rows, {}):
            given = {"w": source} if isinstance(source, torch.Tensor) else ({} if rank else {"w": whole})
            try:
                Publisher(given, process_group=group if not isinstance(source, torch.Tensor) else None).close()
                told.append(("", ""))
            except WeightcastError as error:
                told.append((type(error).__name__, str(error)))
        over = Path(folder) / "over"
        if rank == 0:
            with pytest.raises(
                DeadlineExceeded,
                match=r"not every trainer rank came within 1 s.*Make a Publisher on every rank of the process group",
            ):
                Publisher({"w": whole}, process_group=group, timeout_s=1)
            over.touch()
        else:
            # Whoever leaves the group meanwhile is lost, which is another error than one who does not come.
            end = time.monotonic() + 30
            while not over.exists():
                assert time.monotonic() < end
                time.sleep(0.02)
        return told


def test_what_cannot_be_published_is_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    for told in run_ranks(refusals, 2, str(tmp_path)):
        expected = [
            ("Unsupported", "'w' is a DTensor with placement _StridedShard"),
            ("Unsupported", "'w' is a DTensor with placement P"),
            ("PlanMismatch", "'w' is bfloat16 (6, 4) on trainer rank 0, float32 (6, 4) on rank 1"),
            ("PlanMismatch", "'w' is cut in different ways"),
            ("PlanMismatch", "trainer ranks hold 12 of 24 elements of 'w'"),
            ("InvalidInput", "the state dict is empty"),
        ]
        for (kind, text), (wanted, part) in zip(told, expected, strict=True):
            assert kind == wanted
            assert part in text
        assert all("Publish full tensors: a state dict with full_tensor()" in text for _, text in told[:2])
        assert "A plain tensor counts as whole: give shards as DTensors" in told[2][1]
        assert "with process_group=" in told[4][1]


def publish_changes(rank: int, size: int, folder: str) -> list[str]:
    """Four rounds in which a few values of each tensor change; how the bytes went."""
    with process_group(rank, size, folder):
        seed = agreed_seed()
        whole = checkpoint(seed)
        held = sharded(whole, size, rank)
        models = [DictModel({n: torch.zeros_like(v) for n, v in whole.items()}, rows=(i, 2)) for i in range(2)]
        engines = [LocalEngine("a", models, mode="staged")] if rank == 0 else []
        codecs = []
        with Publisher(
            held, engines, process_group=dist.group.WORLD, transport="tcp", delta=True, timeout_s=TIMEOUT_S
        ) as publisher:
            for number in range(4):
                report = publisher.publish()
                assert report.digests_match
                assert rank or all(model.holds(whole) for model in models)
                codecs += sorted({worker.codec for engine in report.engines for worker in engine.workers})
                generator = torch.Generator().manual_seed(seed + number)
                for value in whole.values():
                    value.reshape(-1)[torch.randint(value.numel(), (2,), generator=generator)] += 0.01
                overwrite(held, sharded_local(whole, held))
        for engine in engines:
            engine.stop()
        return codecs


def test_each_rank_sends_what_changed_of_its_part(tmp_path: Path) -> None:
    told = run_ranks(publish_changes, 2, str(tmp_path), timeout_s=90)
    assert told == [["dense", "delta", "delta", "delta"]] * 2


def publish_tied(rank: int, size: int, folder: str) -> list[tuple[str, str]]:
    """Rounds in which a few values change of tensors that lie in one memory here and there; how the bytes went."""
    with process_group(rank, size, folder):
        told = []
        for mode, is_sharded in (("staged", False), ("in_place", False), ("staged", True)):
            seed = agreed_seed()
            generator = torch.Generator().manual_seed(seed)
            embed = torch.randn(64, 16, generator=generator).to(torch.bfloat16)
            whole = embed.clone()
            held: torch.Tensor = embed
            if is_sharded:
                held = distribute_tensor(embed, init_device_mesh("cpu", (size,)), [Shard(0)])
            model = DictModel({"embed": torch.zeros_like(whole)}, tied={"head": "embed"})
            engines = [LocalEngine("a", [model], mode=mode)] if rank == 0 else []
            with Publisher(
                {"embed": held, "head": held},
                engines,
                process_group=dist.group.WORLD,
                transport="tcp",
                delta=True,
                timeout_s=TIMEOUT_S,
            ) as publisher:
                for _ in range(4):
                    report = publisher.publish()
                    assert report.digests_match
                    assert rank or model.holds({"embed": whole})
                    told += [(w.codec, w.codec_reason) for engine in report.engines for w in engine.workers]
                    whole[torch.rand(whole.shape, generator=generator) < 0.05] *= 1.5
                    local(held).copy_(whole.chunk(size)[rank] if is_sharded else whole)
            for engine in engines:
                engine.stop()
        return told


def test_bytes_that_several_ranks_fill_get_all_values(tmp_path: Path) -> None:
    told = run_ranks(publish_tied, 2, str(tmp_path), timeout_s=90)[0]
    assert told[:8] == [("dense", "several trainer ranks fill the same bytes of tied tensors")] * 8
    assert [codec for codec, _ in told[8:]] == ["dense", "delta", "delta", "delta"], "each byte has one rank"
