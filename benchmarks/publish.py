"""What does publish() cost against a memcpy of the same bytes, and how does it grow with the number of tensors?

Trainer and worker are two processes on one machine; the worker is a LocalEngine (everything but generation). Columns, medians in
one run: memcpy of the same bytes, a broadcast loop over gloo (one call a tensor, what many RL loops do today), publish() over
shm staged with its phases, and the same over tcp.

    python benchmarks/publish.py [--mib 256] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.report.model import Report
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ports import free_port
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient


def tensors_of(count: int, nbytes: int) -> dict[str, torch.Tensor]:
    """bf16 tensors of one total size."""
    numel = nbytes // 2 // count
    return {f"layer.{i}.weight": torch.randn(numel).to(torch.bfloat16) for i in range(count)}


class PipedEngine(EngineClient):
    """A LocalEngine in another process, called through a pipe."""

    kind = "piped"
    host = "127.0.0.1"
    name = "bench"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _call(self, method: str, *args: Any) -> Any:
        self._connection.send((method, args))
        ok, value = self._connection.recv()
        if not ok:
            raise RuntimeError(value)
        return value

    def world_size(self, deadline: Deadline) -> int:
        return 1

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._call("init", dict(init_info))

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(phases=self._call("commit", order.epoch, order.round, order.version))

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._call("rollback", epoch, round)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return self._call("status")

    def shutdown(self, deadline: Deadline) -> None:
        self._call("shutdown")


def engine_process(connection: Connection, count: int, nbytes: int, mode: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine = LocalEngine("bench", [DictModel(tensors_of(count, nbytes))], mode=mode)
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            engine.stop()
            return
        deadline = Deadline(120)
        try:
            if method == "commit":
                order = CommitOrder(epoch=args[0], round=args[1], version=args[2])
                value: Any = dict(engine.commit(order, deadline).phases)
            elif method == "init":
                value = engine.init(args[0], deadline)
            else:
                value = getattr(engine, method)(*args, deadline)
            connection.send((True, value))
        except Exception as error:  # noqa: BLE001 - told to the other process
            connection.send((False, repr(error)))


def gloo_receiver(port: int, count: int, nbytes: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    group = gloo_group(port, 1)
    tensors = list(tensors_of(count, nbytes).values())
    for _ in range(rounds):
        for tensor in tensors:
            group.broadcast(tensor, 0).wait()


def gloo_group(port: int, rank: int) -> dist.ProcessGroupGloo:
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60))
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=120))


def median_s(function: Callable[[], object], rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_memcpy(nbytes: int, rounds: int) -> float:
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    return median_s(lambda: target.copy_(source), rounds)


def measure_loop(count: int, nbytes: int, rounds: int, threads: int) -> float:
    port = free_port()
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=gloo_receiver, args=(port, count, nbytes, rounds + 1, threads))
    child.start()
    try:
        group = gloo_group(port, 0)
        tensors = list(tensors_of(count, nbytes).values())

        def loop() -> None:
            for tensor in tensors:
                group.broadcast(tensor, 0).wait()

        return median_s(loop, rounds)
    finally:
        child.join(60)
        child.kill()


def measure_publish(
    count: int, nbytes: int, rounds: int, transport: str, mode: str, threads: int
) -> tuple[float, float, list[Report]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=engine_process, args=(theirs, count, nbytes, mode, threads))
    child.start()
    theirs.close()
    try:
        source = torch.nn.ParameterDict(
            {name.replace(".", "_"): torch.nn.Parameter(value) for name, value in tensors_of(count, nbytes).items()}
        )
        module = torch.nn.Module()
        names = {name: source[name.replace(".", "_")] for name in tensors_of(count, nbytes)}
        module.parameters_ = source
        from weightcast.sources import ModuleSource

        reports = []
        with Publisher(
            ModuleSource(module, names=names), [PipedEngine(ours)], transport=transport, mode=mode, timeout_s=120
        ) as publisher:
            start = time.perf_counter()
            publisher.connect()
            connect_s = time.perf_counter() - start
            publisher.publish()
            for _ in range(rounds):
                with torch.no_grad():
                    torch._foreach_add_(list(names.values()), 0.01)
                reports.append(publisher.publish())
                assert reports[-1].digests_match
        return statistics.median(report.total_s for report in reports), connect_s, reports
    finally:
        ours.close()
        child.join(20)
        child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 1_000, 10_000])
    parser.add_argument("--threads", type=int, default=1, help="torch threads in each process")
    parser.add_argument("--json", help="append the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    nbytes = options.mib * 2**20
    table = Table(title=f"{options.mib} MiB of bf16, medians of {options.rounds} rounds, milliseconds")
    for column in (
        "tensors",
        "memcpy",
        "gloo loop",
        "way",
        "publish",
        "connect",
        "begin",
        "transfer",
        "verify",
        "commit",
        "memcpy/publish",
        "memcpy/copy",
        "loop/publish",
    ):
        table.add_column(column, justify="right")
    rows = []
    for count in options.counts:
        memcpy_s = measure_memcpy(nbytes, options.rounds)
        loop_s = measure_loop(count, nbytes, options.rounds, options.threads)
        for transport, mode in (("shm", "staged"), ("shm", "in_place"), ("tcp", "staged")):
            publish_s, connect_s, reports = measure_publish(
                count, nbytes, options.rounds, transport, mode, options.threads
            )
            phases = {
                name: statistics.median(report.phase_seconds()[name] for report in reports)
                for name in ("begin", "transfer", "verify", "commit")
            }
            copy_s = statistics.median(report.engines[0].workers[0].seconds for report in reports)
            rows.append(
                {
                    "tensors": count,
                    "nbytes": nbytes,
                    "way": f"{transport} {mode}",
                    "memcpy_s": memcpy_s,
                    "loop_s": loop_s,
                    "publish_s": publish_s,
                    "connect_s": connect_s,
                    "copy_s": copy_s,
                    **phases,
                }
            )
            table.add_row(
                f"{count:,}",
                f"{memcpy_s * 1e3:.1f}",
                f"{loop_s * 1e3:.1f}",
                f"{transport} {mode}",
                f"{publish_s * 1e3:.1f}",
                f"{connect_s * 1e3:.0f}",
                *(f"{phases[n] * 1e3:.1f}" for n in phases),
                f"{memcpy_s / publish_s:.2f}",
                f"{memcpy_s / copy_s:.2f}",
                f"{loop_s / publish_s:.1f}",
            )
    Console(width=150).print(table)
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
