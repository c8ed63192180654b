"""Host memory to a GPU's engine: shm_cuda, tcp, and a checkpoint's files, against one pinned cudaMemcpyAsync of the same bytes.

Trainer and engine are two processes of one host. Rows: the worker's receive() alone, copy and digest in one pass, and a whole publish().
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from bench_publish import report_rows
from common import Table, gpu_ms, reports_of, wall_ms
from shapes import SHAPES, layouts
from torch import nn

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import compile_plan
from weightcast.sources import ModuleSource
from weightcast.testing.peer_engine import PeerEngine
from weightcast.testing.ranks import Peer
from weightcast.transports.shm_cuda import ShmCudaTransport


class Trainer:
    """A process whose weights lie in host memory."""

    def open(self, name: str) -> bytes:
        manifest, held, wanted = layouts(SHAPES[name])
        storages = [random_bytes(n) for n in held.storage_nbytes]
        self.transport = ShmCudaTransport()
        self.memory = self.transport.adopt(Memory(storages))
        self.end = self.transport.trainer_end(compile_plan(manifest, {0: held}, wanted)[0], self.memory)
        return self.end.offer()

    def close(self) -> None:
        self.end.close()
        self.transport.release(self.memory)
        self.memory = Memory([])
        gc.collect()


def random_bytes(nbytes: int) -> torch.Tensor:
    """Made on the GPU, where that takes no time."""
    words = torch.randint(-(2**62), 2**62, (-(-nbytes // 8),), device="cuda")
    return words.view(torch.uint8)[:nbytes].cpu()


def floor(table: Table, nbytes: int) -> float:
    """One copy of page-locked memory to the GPU."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    milliseconds = gpu_ms(lambda: device.copy_(host, non_blocking=True), 5)
    table.add(f"one pinned copy of {nbytes / 1e9:.1f} GB", milliseconds, nbytes)
    return milliseconds


def receive(table: Table, name: str, floor_ms: float) -> None:
    manifest, held, wanted = layouts(SHAPES[name])
    plan = compile_plan(manifest, {0: held}, wanted)[0]
    with Peer(Trainer) as trainer:
        offer = trainer.call("open", name, timeout_s=120)
        memory = Memory([torch.zeros(n, dtype=torch.uint8, device="cuda") for n in wanted.storage_nbytes])
        end = ShmCudaTransport().worker_end(offer, plan)
        start = time.perf_counter()
        end.connect(Deadline(120))
        connect_s = time.perf_counter() - start
        end.warm_up(memory, manifest)

        def row(what: str, call: Callable[[], object]) -> None:
            milliseconds = wall_ms(call, 5)
            share = f"{floor_ms / milliseconds:.0%} of the pinned copy's rate; connect {connect_s:.2f} s"
            table.add(f"{name} shm_cuda {what}", milliseconds, memory.nbytes, share)

        row("receive()", lambda: end.receive(memory, Deadline(60)))
        row("receive_proven()", lambda: end.receive_proven(memory, manifest, Deadline(60)))
        end.close()
        trainer.call("close")


def publish(table: Table, name: str, transport: str, mode: str, rounds: int) -> None:
    manifest, _, wanted = layouts(SHAPES[name])
    module, values = nn.ParameterList(), {}
    for spec in manifest.tensors:
        value = random_bytes(spec.nbytes).view(torch.bfloat16).view(spec.shape)
        values[spec.name] = nn.Parameter(value, requires_grad=False)
        module.append(values[spec.name])

    def step() -> None:
        for value in list(values.values())[:8]:
            value.view(torch.int16).bitwise_not_()

    with PeerEngine() as engine:
        engine.store(wanted, device="cuda", mode=mode)
        with Publisher(ModuleSource(module, names=values), [engine], transport=transport, timeout_s=100) as publisher:
            start = time.perf_counter()
            publisher.connect()
            connect_s = time.perf_counter() - start
            reports = reports_of(publisher, step, rounds)
        report_rows(table, f"{name} host to GPU, {transport} {mode}", reports, connect_s, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    parser.add_argument("--publish", nargs="+", default=["0.6B"], help="shapes that are published as a whole, too")
    parser.add_argument("--threads", type=int, default=8, help="torch's, for the trainer's digest")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("host")
    for name in options.shapes:
        _, _, wanted = layouts(SHAPES[name])
        floor_ms = floor(table, sum(wanted.storage_nbytes))
        gc.collect()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        runs: list[tuple[str, Callable[[], None]]] = [("receive", lambda: receive(table, name, floor_ms))]  # noqa: B023
        if name in options.publish:
            for transport, mode in (("shm_cuda", "staged"), ("shm_cuda", "in_place"), ("tcp", "staged")):
                runs.append(
                    (f"{transport} {mode}", lambda t=transport, m=mode: publish(table, name, t, m, options.rounds))  # type: ignore[misc]  # noqa: B023
                )
        for what, run in runs:
            try:
                run()
            except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                table.fail(f"{name} {what}", error)
            gc.collect()
            torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
