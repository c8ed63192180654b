"""Timing, tables and random memory for the GPU benchmarks."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from weightcast import Publisher
from weightcast.layout.memory import Memory
from weightcast.report.model import Report


def end_cleanly_when_terminated() -> None:
    """SIGTERM, from a time limit, ends what was started as well: servers and engines are processes of their own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def random_memory(nbytes: Sequence[int]) -> Memory:
    """Storages of random bytes."""
    storages = []
    for size in nbytes:
        words = torch.randint(-(2**62), 2**62, (-(-size // 8),), device="cuda")
        storages.append(words.view(torch.uint8)[:size])
    return Memory(storages)


def gpu_ms(call: Callable[[], object], repeats: int = 7, warmup: int = 2) -> float:
    """Median milliseconds by events around the call."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def wall_ms(call: Callable[[], object], repeats: int = 7, warmup: int = 2) -> float:
    """Median milliseconds by the host's clock; the call has to wait for its own work."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def reports_of(
    publisher: Publisher, step: Callable[[], object], rounds: int, *, prepared: bool = False
) -> list[Report]:
    """What so many rounds did, each after a step and on an idle GPU; two before them, which compile, are left out. ``prepared``: the
    trainer's digest is begun before the round."""
    reports = []
    for _ in range(rounds + 2):
        step()
        if prepared:
            publisher.prepare()
        torch.cuda.synchronize()
        reports.append(publisher.publish())
        assert reports[-1].digests_match
    return reports[2:]


class Medians(NamedTuple):
    """Of some rounds, in milliseconds: the whole call, its phases by name, and the copy in the first engine's first worker."""

    total_ms: float
    phases_ms: dict[str, float]
    copy_ms: float

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Medians:
        phases = [report.phase_seconds() for report in reports]
        return cls(
            statistics.median(report.total_s for report in reports) * 1e3,
            {name: round(statistics.median(each.get(name, 0.0) for each in phases) * 1e3, 2) for name in phases[0]},
            statistics.median(report.engines[0].workers[0].seconds for report in reports) * 1e3,
        )


class Table:
    """Rows that are printed as they come and appended to a JSON file at the end.

    A row that fails does not keep the others from being measured, but the program's exit status says so.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[dict[str, object]] = []
        self._failures: list[str] = []

    def add(self, what: str, ms: float, nbytes: int, note: str = "") -> None:
        """``nbytes`` are what the rate counts."""
        rate = nbytes / ms / 1e6
        self._rows.append({"what": what, "ms": round(ms, 4), "gb_per_s": round(rate, 1), "note": note})
        print(f"{self._name:8s} {what:46s} {ms:10.3f} ms {rate:9.1f} GB/s  {note}", flush=True)

    def fail(self, what: str, error: Exception) -> None:
        """Note a row that could not be measured."""
        self._failures.append(what)
        print(f"{self._name:8s} {what}: {type(error).__name__}: {str(error)[:1500]}", flush=True)

    def exit(self) -> NoReturn:
        """End the program: status 1 when a row failed."""
        if self._failures:
            print(f"FAILED: {', '.join(self._failures)}", flush=True)
        sys.exit(1 if self._failures else 0)

    def save(self) -> None:
        folder = Path(os.environ.get("OUT", "."))
        with (folder / "gpu.jsonl").open("a") as file:
            file.write(
                json.dumps({"table": self._name, "gpu": torch.cuda.get_device_name(), "rows": self._rows}) + "\n"
            )
