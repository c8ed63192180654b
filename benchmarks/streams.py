"""What does a round over a stream cost against the same bytes from a module, and how much memory does the trainer take for it?

Two publishers in one process, one of a module and one of a stream of the same tensors, each with an engine in a process of its own;
their rounds alternate, so that both see the same load. The trainer's processor time says what a busy machine hides. Producing a tensor of the stream costs nothing here. For the memory a model is
produced tensor by tensor in one buffer, and the trainer's anonymous and shared memory is read every few milliseconds.

    python benchmarks/streams.py [--mib 256] [--rounds 7] [--memory-mib 1024] [--window-mib 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from publish import PipedEngine, engine_process, tensors_of
from rich.console import Console
from rich.table import Table

from weightcast import Publisher, StreamSource
from weightcast.sources import ModuleSource

TIMEOUT_S = 120.0


@contextmanager
def piped_engine(count: int, nbytes: int, threads: int) -> Iterator[PipedEngine]:
    """A staged engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=engine_process, args=(theirs, count, nbytes, "staged", threads))
    child.start()
    theirs.close()
    try:
        yield PipedEngine(ours)
    finally:
        ours.close()
        child.join(20)
        child.kill()


def module_of(names: dict[str, torch.Tensor]) -> ModuleSource:
    module = torch.nn.Module()
    module.parameters_ = torch.nn.ParameterDict({name.replace(".", "_"): value for name, value in names.items()})
    return ModuleSource(module, names=names)


def measure(count: int, nbytes: int, rounds: int, transport: str, window_nbytes: int, threads: int) -> dict[str, Any]:
    """Seconds of rounds of a module and of a stream, side by side."""
    names: dict[str, torch.Tensor] = {
        name: torch.nn.Parameter(value) for name, value in tensors_of(count, nbytes).items()
    }
    seconds: dict[str, list[float]] = {"module": [], "stream": []}
    busy: dict[str, list[float]] = {"module": [], "stream": []}
    with ExitStack() as stack:
        sources = {
            "module": module_of(names),
            "stream": StreamSource(lambda: names.items(), window_nbytes=window_nbytes),
        }
        publishers = {
            way: stack.enter_context(
                Publisher(
                    source,
                    [stack.enter_context(piped_engine(count, nbytes, threads))],
                    transport=transport,
                    timeout_s=TIMEOUT_S,
                )
            )
            for way, source in sources.items()
        }
        for number in range(rounds + 2):
            with torch.no_grad():
                torch._foreach_add_(list(names.values()), 0.01)
            for way, publisher in publishers.items():
                start = time.process_time()
                report = publisher.publish()
                assert report.digests_match
                if number > 1:
                    seconds[way].append(report.total_s)
                    busy[way].append(time.process_time() - start)
    found = {way: statistics.median(values) for way, values in seconds.items()}
    ratios = [s / m for s, m in zip(seconds["stream"], seconds["module"], strict=True)]
    cpu = {f"{way}_trainer_cpu_s": statistics.median(values) for way, values in busy.items()}
    row = {"tensors": count, "nbytes": nbytes, "transport": transport, "window_nbytes": window_nbytes}
    return {**row, **found, **cpu, "ratio": statistics.median(ratios)}


def resident_nbytes() -> int:
    """Anonymous and shared memory of this process; files that are mapped do not count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Watch:
    """The most memory that this process has while the watch runs."""

    def __init__(self) -> None:
        self.most = resident_nbytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, resident_nbytes())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def measure_memory(nbytes: int, window_nbytes: int, transport: str, threads: int) -> dict[str, Any]:
    """The trainer's memory beside the one buffer that its tensors are produced in."""
    count = 64
    numel = nbytes // 2 // count
    buffer = torch.randn(numel).to(torch.bfloat16)

    def produced() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(count):
            buffer.add_(0.01)
            yield f"layer.{number}.weight", buffer

    with piped_engine(count, nbytes, threads) as engine:
        torch.ones(4096).sum().item()
        before = resident_nbytes()
        watch = Watch()
        source = StreamSource(produced, window_nbytes=window_nbytes)
        with Publisher(source, [engine], transport=transport, timeout_s=TIMEOUT_S) as publisher:
            for _ in range(3):
                assert publisher.publish().digests_match
        most = watch.stop()
    return {
        "transport": transport,
        "nbytes": nbytes,
        "window_nbytes": window_nbytes,
        "tensor_nbytes": buffer.numel() * 2,
        "extra_nbytes": most - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 300, 3_000])
    parser.add_argument("--transports", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--window-mib", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="torch threads in each process")
    parser.add_argument("--json", help="append the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    table = Table(title=f"{options.mib} MiB of bf16, medians of {options.rounds} alternating rounds, milliseconds")
    for column in (
        "transport",
        "tensors",
        "window MiB",
        "module",
        "stream",
        "stream/module",
        "trainer's CPU, module",
        "stream",
    ):
        table.add_column(column, justify="right")
    for transport in options.transports:
        for count in options.counts:
            for window in options.window_mib:
                row = measure(count, options.mib * 2**20, options.rounds, transport, window * 2**20, options.threads)
                rows.append(row)
                times = [f"{row['module'] * 1e3:.1f}", f"{row['stream'] * 1e3:.1f}", f"{row['ratio']:.2f}"]
                times += [f"{row[f'{way}_trainer_cpu_s'] * 1e3:.1f}" for way in ("module", "stream")]
                table.add_row(transport, f"{count:,}", str(window), *times)
    console = Console(width=120)
    console.print(table)
    for transport in options.transports if options.memory_mib else ():
        row = measure_memory(options.memory_mib * 2**20, options.window_mib[0] * 2**20, transport, options.threads)
        rows.append(row)
        extra, window = row["extra_nbytes"] / 2**20, row["window_nbytes"] / 2**20
        console.print(
            f"{transport}: {options.memory_mib} MiB through {window:.0f} MiB of window take {extra:.0f} MiB of the trainer's memory"
        )
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
