"""Engines that feed each other what several trainer ranks hold: each rank sends its part once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.sync.test_several_ranks import overwrite, process_group, sharded, sharded_local
from torch import distributed as dist

from weightcast import Publisher
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks
from weightcast.trainer.fleet.feeding import Feeding

SHAPES = {"rows": (407, 40), "columns": (60, 90), "tiny": (1, 300), "replica": (100, 40), "plain": (900,), "grid": (50, 60)}  # fmt: skip
WAYS = (True, True, False, True)
"""Whether rounds use the chain."""


def values(seed: int) -> dict[str, torch.Tensor]:
    """The same on every rank that asks for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in SHAPES.items()}


def publish(rank: int, size: int, mode: str, seed: int) -> list[list[int]]:
    """What was sent to each worker in each round, on rank 0 after a look at every live byte."""
    held, sent = sharded(values(seed), size, rank), []
    models = [DictModel({name: torch.zeros_like(value) for name, value in values(seed).items()}) for _ in range(3)]
    engines = [LocalEngine(f"e{number}", [model], mode=mode) for number, model in enumerate(models)]
    settings = {"transport": "tcp", "relay": [["e0", "e1", "e2"]], "bucket_nbytes": 2**12, "timeout_s": 120}
    settings |= {"mode": mode, "silence_s": 60}
    way, group = [True], dist.group.WORLD
    with (
        pytest.MonkeyPatch.context() as patched,
        Publisher(held, engines if rank == 0 else [], process_group=group, **settings) as publisher,  # type: ignore[arg-type]
    ):
        patched.setattr(Feeding, "choose", lambda feeding: setattr(feeding, "is_on", way[0]))
        for number, is_on in enumerate(WAYS):
            whole = values(seed + number)
            overwrite(held, sharded_local(whole, held))
            way[0] = is_on
            report = publisher.publish()
            assert report.digests_match
            assert rank or all(model.holds(whole) for model in models), number
            sent.append([worker.sent_nbytes for engine in report.engines for worker in engine.workers])
    for engine in engines:
        engine.stop()
    return sent


def publish_in_both_modes(rank: int, size: int, folder: str, seed: int) -> list[list[list[int]]]:
    with process_group(rank, size, folder):
        return [publish(rank, size, mode, seed) for mode in ("staged", "in_place")]


def test_each_rank_sends_its_part_to_the_first_engine(tmp_path: Path) -> None:
    told, _ = run_ranks(publish_in_both_modes, 2, str(tmp_path), int(torch.randint(2**31, ())))
    whole = sum(value.nbytes for value in values(0).values())
    for rounds in told:
        for is_on, (first, *rest) in zip(WAYS, rounds, strict=True):
            assert first >= whole
            assert rest == ([0, 0] if is_on else [first, first])
