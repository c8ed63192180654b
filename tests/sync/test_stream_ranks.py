"""Streams of several trainer ranks: all of them gather, rank 0 keeps and sends, and a round that fails leaves no rank in a gather."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from weightcast import Publisher, StreamSource
from weightcast.errors import WeightcastError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

SHAPES = {"b.rows": (6, 300), "c.small": (2, 3), "a.large": (40, 200)}
WINDOW_NBYTES = 4 * 4096
TIMEOUT_S = 20.0


class Fault(NamedTuple):
    """What one rank does otherwise in one round."""

    rank: int
    kind: str
    at: str


def values_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def gathered(seed: int, rank: int, size: int, fault: Fault | None) -> Iterator[tuple[str, Any]]:
    """Rows of each rank, gathered tensor by tensor into one buffer, which is NaN once the iterator goes on."""
    buffer = torch.empty(max(value.numel() for value in values_of(seed).values()))
    for name, value in values_of(seed).items():
        if fault is not None and (fault.rank, fault.kind, fault.at) == (rank, "late", name):
            time.sleep(0.7)
        whole = buffer[: value.numel()].view(value.shape)
        dist.all_gather(list(whole.chunk(size)), value.chunk(size)[rank].clone())
        if fault is not None and (fault.rank, fault.at) == (rank, name):
            if fault.kind == "raises":
                raise ZeroDivisionError("its own")
            if fault.kind == "twice":
                yield "b.rows", torch.zeros(SHAPES["b.rows"])
        yield name, whole if rank == 0 else None
        buffer.fill_(torch.nan)


FAULTS = [
    None,
    Fault(1, "late", "c.small"),
    Fault(0, "twice", "c.small"),
    None,
    Fault(1, "raises", "a.large"),
    None,
    Fault(0, "late", "a.large"),
    Fault(1, "too late", "b.rows"),
    None,
]


def train(rank: int, size: int, folder: str, transport: str) -> list[tuple[str, str]]:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    now: dict[str, Any] = {"seed": 1, "fault": None}
    model = DictModel({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    engine = LocalEngine("local", [model], mode="staged")
    form = [(name, torch.float32, shape) for name, shape in SHAPES.items()]

    def stream() -> Iterator[tuple[str, Any]]:
        fault = now["fault"]
        if fault is not None and fault.kind == "too late" and fault.rank == rank:
            time.sleep(2.5)
        return gathered(now["seed"], rank, size, fault)

    source = StreamSource(stream, window_nbytes=WINDOW_NBYTES, metadata=form)
    told = []
    engines = [engine] if rank == 0 else []
    with Publisher(
        source, engines, transport=transport, timeout_s=TIMEOUT_S, process_group=dist.group.WORLD
    ) as publisher:
        publisher.connect()
        for number, fault in enumerate(FAULTS):
            now.update(seed=number, fault=fault)
            served = {name: value.clone() for name, value in model.parameters().items()}
            short = fault is not None and fault.kind == "too late"
            try:
                publisher.publish(timeout_s=1.5 if short else None)
                told.append(("", ""))
            except WeightcastError as error:
                told.append((type(error).__name__, str(error)))
            if rank == 0:
                assert model.holds(values_of(number) if told[-1] == ("", "") else served), fault
        if rank > 0:
            assert publisher._part._holder.source.memory.nbytes == 0
    engine.stop()
    dist.destroy_process_group()
    return told


def test_late_and_failing_ranks_are_exact_or_a_named_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(train, 2, str(tmp_path), "shm")
    kinds = {0: "", 1: "", 2: "StateError", 3: "", 5: "", 6: "", 8: ""}
    for number, kind in kinds.items():
        assert (first[number][0], second[number][0]) == (kind, kind), (first[number], second[number])
    # After the deadline a rank does not wait long for what rank 0, on a busy machine, has still to say.
    assert first[7][0] == "RoundFailed"
    assert second[7][0] in ("RoundFailed", "DeadlineExceeded"), second[7]
    assert "'b.rows' twice" in first[2][1]
    assert "'b.rows' twice" in second[2][1]
    assert "trainer rank 1" in first[4][1]
    assert "its own" in first[4][1]
    assert first[4] == second[4]
