"""What do requests in flight feel of a publish()? The gap between two tokens, as a client of the server sees it.

A `weightcast serve` process answers streams without end while this process publishes a random Qwen3 model to it over and over.
Columns, medians over the rounds of one run: the usual gap between tokens while nothing is published, the longest gap of each
round that ends while its bytes arrive (arrival) and the longest around its commit, and the engine's own account of the commit. Rows: staged, with
the keys and values of requests in flight recomputed under the new weights or kept (``clear_cache=False``), and as a comparison
in place, that is, paused for the whole transfer.

    python benchmarks/stall.py [--rounds 9] [--streams 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx
import torch
import transformers
from rich.console import Console
from rich.table import Table

from weightcast import Publisher
from weightcast.report.model import Report
from weightcast.testing.models import build_tiny_model
from weightcast_demo.server import ServerProcess

SHAPES = {
    "m20": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
    "m150": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16},
}
NAME = "policy"
STREAM_TOKENS = 400
WARM_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One row of the table."""

    mode: Literal["staged", "in_place"] = "staged"
    transport: str = "shm"
    clear_cache: bool = True

    def __str__(self) -> str:
        return f"{self.transport} {self.mode}" + ("" if self.clear_cache else ", kept cache")


WAYS = (
    Way(),
    Way(clear_cache=False),
    Way(transport="tcp"),
    Way(mode="in_place"),
    Way(mode="in_place", clear_cache=False),
)


class Stream(threading.Thread):
    """One client that asks for one long answer after the other and notes when each token came."""

    def __init__(self, url: str, stop: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self._url, self._stop_asking, self._seed = url, stop, seed

    def run(self) -> None:
        body = {
            "model": NAME,
            "prompt": [5 + self._seed, 6, 7, 8],
            "max_tokens": STREAM_TOKENS,
            "temperature": 1.0,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.Client(timeout=120, trust_env=False) as client:
            while not self._stop_asking.is_set():
                with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                    answer.raise_for_status()
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self.times.append(time.monotonic())
                        if self._stop_asking.is_set():
                            break


def gaps(streams: Sequence[Stream], start: float, end: float, *, whole: bool = False) -> list[float]:
    """Times between two tokens of one stream that touch the interval, or lie wholly in it."""
    return [
        after - before
        for stream in streams
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if (start <= before and after <= end if whole else after >= start and before <= end)
    ]


@contextmanager
def load(url: str, count: int) -> Iterator[list[Stream]]:
    """So many streams, running."""
    stop = threading.Event()
    streams = [Stream(url, stop, seed) for seed in range(count)]
    for stream in streams:
        stream.start()
    try:
        yield streams
    finally:
        stop.set()
        for stream in streams:
            stream.join(30)


def commit_phases(report: Report) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in report.engines[0].phases}


def measure(checkpoint: Path, way: Way, options: argparse.Namespace) -> dict[str, object]:
    """One way of publishing under load."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    serve = ("--served-model-name", NAME, "--dtype", "bfloat16", "--max-model-len", "512", "--device", "cpu")
    usual: list[float] = []
    arrival: list[float] = []
    around: list[float] = []
    reports: list[Report] = []
    with ServerProcess(checkpoint, *serve) as server:
        server.wait_until_listening()
        with Publisher(
            model,
            [server.url],
            token=server.token,
            mode=way.mode,
            transport=way.transport,
            clear_cache=way.clear_cache,
        ) as publisher:
            publisher.publish()
            with load(server.url, options.streams) as streams:
                time.sleep(2 * WARM_S)
                for _ in range(options.rounds):
                    quiet = time.monotonic()
                    time.sleep(WARM_S)
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter.add_(torch.randn_like(parameter), alpha=0.01)
                    start = time.monotonic()
                    report = publisher.publish()
                    end = time.monotonic()
                    assert report.digests_match
                    reports.append(report)
                    time.sleep(WARM_S / 2)
                    commit = next(phase for phase in report.phases if phase.name == "commit")
                    usual.append(statistics.median(gaps(streams, quiet, start)))
                    arrival.append(max(gaps(streams, start, start + commit.start_s, whole=True), default=0.0))
                    around.append(max(gaps(streams, start + commit.start_s, end), default=0.0))
    commits = [commit_phases(report) for report in reports]
    return {
        "way": str(way),
        "nbytes": reports[0].nbytes,
        "usual_s": statistics.median(usual),
        "arrival_s": statistics.median(arrival),
        "around_s": statistics.median(around),
        "worst_s": max(around),
        "stall_s": statistics.median(gap - step for gap, step in zip(around, usual, strict=True)),
        "publish_s": statistics.median(report.total_s for report in reports),
        **{f"{name}_s": statistics.median(each[name] for each in commits) for name in commits[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="m20")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--json", help="append the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[options.shape]
        heads = shape["hidden_size"] // 64
        checkpoint = build_tiny_model(
            folder, "qwen3", dtype="bfloat16", num_attention_heads=heads, num_key_value_heads=heads // 2, **shape
        )
        for way in WAYS:
            rows.append(measure(checkpoint, way, options))
    title = f"{options.shape}, {rows[0]['nbytes'] / 1e6:.0f} MB, {options.streams} streams, medians, milliseconds"
    table = Table(title=title)
    phases = [key for key in rows[0] if key in ("pause_s", "apply_s", "resume_s")]
    columns = ("usual_s", "arrival_s", "around_s", "worst_s", "stall_s", *phases, "publish_s")
    table.add_column("way")
    for column in columns:
        table.add_column(column.removesuffix("_s"), justify="right")
    for row in rows:
        table.add_row(str(row["way"]), *(f"{float(row[column]) * 1e3:.1f}" for column in columns))
    Console(width=140).print(table)
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
