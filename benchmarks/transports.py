"""How fast do transports move one model between two processes of this machine?

    python benchmarks/transports.py [--mib 256] [--rounds 7] [--json FILE]

Compares, for 10, 1,000 and 10,000 bfloat16 tensors of the same total: one memcpy of the bytes, shm, tcp and tls (into an arena, as a
staged round does, and into one storage per tensor, as an in-place round does), and a broadcast of every tensor by itself with
torch.distributed's gloo. Times are medians over rounds on the receiving side; first rounds, which compile and touch the
memory, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from weightcast.deadline import Deadline
from weightcast.layout import Layout, Placement, Region, image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy, compile_plan
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_sides import TrainerSide, WorkerSide
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES

TIMEOUT_S = 120.0


class Trainer(TrainerSide):
    def send_rounds(self, count: int) -> None:
        for _ in range(count):
            self.send(TIMEOUT_S)

    def broadcast_rounds(self, meeting: str, sizes: list[int], count: int) -> None:
        _broadcast_rounds(meeting, 0, sizes, count)


class Worker(WorkerSide):
    def prepare(self, nbytes: tuple[int, ...], is_arena: bool) -> None:
        self._memories[0] = Memory([torch.zeros(n, dtype=torch.uint8) for n in nbytes], is_arena=is_arena)

    def receive_rounds(self, count: int) -> list[float]:
        return [_seconds(lambda: self.end.receive(self._memories[0], Deadline(TIMEOUT_S))) for _ in range(count)]

    def memcpy_rounds(self, nbytes: int, count: int) -> list[float]:
        src, dst = torch.randint(0, 256, (nbytes,), dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        return [_seconds(lambda: dst.copy_(src)) for _ in range(count)]

    def broadcast_rounds(self, meeting: str, sizes: list[int], count: int) -> list[float]:
        return _broadcast_rounds(meeting, 1, sizes, count)


def _broadcast_rounds(meeting: str, rank: int, sizes: list[int], count: int) -> list[float]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    tensors = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]

    def one_round() -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    try:
        return [_seconds(one_round) for _ in range(count)]
    finally:
        dist.destroy_process_group()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _model(num_tensors: int, total_nbytes: int) -> Manifest:
    numel = total_nbytes // 2 // num_tensors
    return Manifest.of(TensorSpec(name=f"w{i}", dtype="bfloat16", shape=(numel,)) for i in range(num_tensors))


def _one_storage_each(manifest: Manifest) -> Layout:
    """A module's parameters: each has its own storage."""
    placements = tuple(
        Placement(region=Region.whole(spec), dtype=spec.dtype, storage=i, offset=0, strides=(1,))
        for i, spec in enumerate(manifest.tensors)
    )
    return Layout(placements=placements, storage_nbytes=tuple(spec.nbytes for spec in manifest.tensors))


def _measure(num_tensors: int, total_nbytes: int, rounds: int) -> Iterator[tuple[str, list[float]]]:
    manifest = _model(num_tensors, total_nbytes)
    held = _one_storage_each(manifest)
    warm = rounds + 2
    with Peer(Trainer, rank=0) as trainer, Peer(Worker) as worker:
        yield "memcpy", worker.call("memcpy_rounds", manifest.nbytes, warm, timeout_s=TIMEOUT_S)[2:]
        for transport in ("shm", "tcp", "tls"):
            for label, landings in (("arena", image_layout(manifest)), ("live", held)):
                copies = compile_plan(manifest, {0: held}, landings)[0]
                yield f"{transport} {label}", _rounds(trainer, worker, transport, copies, held, landings, warm)[2:]
        with tempfile.TemporaryDirectory() as folder:
            args = (str(Path(folder, "meeting")), [spec.numel for spec in manifest.tensors], warm)
            trainer.start("broadcast_rounds", *args)
            yield "broadcast loop", worker.call("broadcast_rounds", *args, timeout_s=TIMEOUT_S)[2:]
            trainer.result(TIMEOUT_S)


def _rounds(
    trainer: Peer, worker: Peer, transport: str, copies: tuple[Copy, ...], held: Layout, landings: Layout, count: int
) -> list[float]:
    offer = trainer.call("open", transport, "cpu", copies, held.storage_nbytes, DEFAULT_BUCKET_NBYTES)
    worker.call("open", transport, "cpu", offer, copies)
    worker.call("prepare", landings.storage_nbytes, len(landings.storage_nbytes) == 1)
    worker.start("connect")
    trainer.call("connect")
    worker.result()
    trainer.start("send_rounds", count)
    seconds: list[float] = worker.call("receive_rounds", count, timeout_s=TIMEOUT_S)
    trainer.result(TIMEOUT_S)
    worker.call("close")
    trainer.call("close")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tensors", type=int, nargs="+", default=[10, 1_000, 10_000])
    parser.add_argument("--json", type=Path, help="append the results to this file, one object a line")
    options = parser.parse_args()
    table = Table("tensors", "how", "ms", "GB/s", "of memcpy", title=f"{options.mib} MiB, {os.cpu_count()} cores")
    for num_tensors in options.tensors:
        memcpy_s = 0.0
        for how, seconds in _measure(num_tensors, options.mib * 2**20, options.rounds):
            median_s = statistics.median(seconds)
            memcpy_s = memcpy_s or median_s
            rate = options.mib * 2**20 / median_s / 1e9
            table.add_row(
                f"{num_tensors:,}", how, f"{1000 * median_s:.1f}", f"{rate:.2f}", f"{100 * memcpy_s / median_s:.0f} %"
            )
            if options.json:
                row = {"tensors": num_tensors, "how": how, "mib": options.mib, "seconds": seconds}
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
