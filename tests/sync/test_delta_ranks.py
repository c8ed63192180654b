"""Changes of several trainer ranks: each tells those of its shards, and what a worker adds up of all of them is the trainer's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.sync.test_deltas import load_kernels
from tests.sync.test_several_ranks import overwrite, process_group, sharded, sharded_local
from torch import distributed as dist

from weightcast import Publisher, cpu
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

pytest.importorskip("numba", reason="kernels read what changes")

SHAPES = {"rows": (407, 40), "columns": (60, 90), "tiny": (1, 300), "replica": (100, 40), "plain": (900,), "grid": (50, 60)}  # fmt: skip
ROUNDS = 6


def values(seed: int) -> dict[str, torch.Tensor]:
    """The same on every rank that asks for the same seed."""
    torch.manual_seed(seed)
    return {name: (torch.randn(shape) * 0.02).to(torch.bfloat16) for name, shape in SHAPES.items()}


def step(whole: dict[str, torch.Tensor], seed: int) -> None:
    """Some values are others, by a unit of the last place or two; the same on every rank."""
    torch.manual_seed(seed)
    for value in whole.values():
        bits = value.view(torch.int16)
        bits += (torch.rand(value.shape) < 0.02) * torch.randint(-2, 3, value.shape, dtype=torch.int16)


def publish(rank: int, size: int, mode: str, seed: int) -> list[tuple[str, str]]:
    """What each round's workers say of their codec and digest, on rank 0 after a look at every live byte."""
    whole = values(seed)
    held = sharded(whole, size, rank)
    models = [
        DictModel({name: torch.zeros_like(value) for name, value in whole.items()}, rows=(i, 2)) for i in range(2)
    ]
    engine = LocalEngine("a", models if rank == 0 else [], mode=mode)
    told = []
    settings = {"transport": "tcp", "delta": True, "mode": mode, "bucket_nbytes": 2**14, "timeout_s": 60}
    with Publisher(held, [engine] if rank == 0 else [], process_group=dist.group.WORLD, **settings) as publisher:  # type: ignore[arg-type]
        for number in range(ROUNDS):
            report = publisher.publish()
            assert report.digests_match
            assert rank or all(model.holds(whole) for model in models), number
            workers = [worker for each in report.engines for worker in each.workers]
            assert len({(worker.codec, worker.digested) for worker in workers}) == 1
            told.append((workers[0].codec, workers[0].digested))
            step(whole, seed + number + 1)
            overwrite(held, sharded_local(whole, held))
    engine.stop()
    return told


def publish_in_both_modes(rank: int, size: int, folder: str, seed: int) -> list[list[tuple[str, str]]]:
    cpu.WORTH_NBYTES = 0
    load_kernels()
    with process_group(rank, size, folder):
        return [publish(rank, size, mode, seed) for mode in ("staged", "in_place")]


def test_every_byte_is_the_trainers_and_digests_follow_from_what_changed(tmp_path: Path) -> None:
    load_kernels()  # here, and not in each rank
    first, second = run_ranks(publish_in_both_modes, 2, str(tmp_path), int(torch.randint(2**31, ())))
    assert first == second
    for told in first:
        assert told[0] == ("dense", "all")
        assert told[3:] == [("delta", "changed")] * (ROUNDS - 3)
