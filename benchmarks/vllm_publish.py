"""What does publish() cost a stock vLLM on CPU, how long do requests in flight stand still, and how much of it is vLLM's own reload?

A served model of about 400M parameters in bf16, streams in flight, one trainer process. For each transport and mode, medians of
one run: the round with its phases (the engine's own pause, apply and resume are inside "commit"), the longest gap between two
tokens of a stream while the round ran, less the usual gap, and vLLM's layerwise reload of the same tensors by itself. The stall
contains the recomputation of keys and values under the new weights; "kept" does without.

    make setup-vllm && .venv-vllm/bin/python benchmarks/vllm_publish.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from weightcast import Publisher
from weightcast.report.model import Report
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
WAYS = ("shm staged", "shm in_place", "tcp staged", "tcp in_place", "shm staged kept")
MARK = "RELOAD "


class Stream(threading.Thread):
    """One request after another; notes when each token came."""

    def __init__(self, served: Served, number: int) -> None:
        super().__init__(daemon=True)
        self._served, self._number, self.running = served, number, True
        self.times: list[float] = []

    def run(self) -> None:
        body = {
            "model": "policy",
            "prompt": [self._number + 1] * 8,
            "max_tokens": 180,
            "ignore_eos": True,
            "stream": True,
        }
        while self.running:
            with httpx.stream("POST", self._served.url + "/v1/completions", json=body, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        self.times.append(time.perf_counter())
                    if not self.running:
                        return

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between two tokens, for all pairs that touch the span."""
        return [after - before for before, after in itertools.pairwise(self.times) if after >= start and before <= end]

    def gaps_after(self, end: float, count: int) -> list[float]:
        """Wait for ``count`` further tokens; the seconds between them."""
        limit = time.perf_counter() + 60
        while len(times := [moment for moment in self.times if moment > end]) <= count:
            if time.perf_counter() > limit:
                raise TimeoutError("a stream stands still")
            time.sleep(0.05)
        return [after - before for before, after in itertools.pairwise(times)]


@contextmanager
def streams(served: Served, count: int) -> Iterator[list[Stream]]:
    running = [Stream(served, number) for number in range(count)]
    for stream in running:
        stream.start()
    try:
        yield running
    finally:
        for stream in running:
            stream.running = False
        for stream in running:
            stream.join(60)


def measure(served: Served, trained: torch.nn.Module, way: str, rounds: int, num_streams: int) -> dict[str, Any]:
    """Publish ``rounds`` times while streams run."""
    transport, mode, *kept = way.split()
    reports: list[Report] = []
    stalls, usual = [], []
    with Publisher(
        trained,
        [served.url],
        token=served.token,
        transport=transport,
        mode=mode,
        clear_cache=not kept,
        timeout_s=120,
    ) as publisher:
        start = time.perf_counter()
        publisher.connect()
        connect_s = time.perf_counter() - start
        publisher.publish()
        with streams(served, num_streams) as running:
            time.sleep(4)
            for _ in range(rounds):
                with torch.no_grad():
                    torch._foreach_mul_(list(trained.parameters()), 1.001)
                start = time.perf_counter()
                reports.append(publisher.publish())
                end = time.perf_counter()
                assert reports[-1].digests_match
                usual.append(statistics.median(gap for stream in running for gap in stream.gaps_after(end, 8)))
                stalls.append(max(gap for stream in running for gap in stream.gaps(start, end)) - usual[-1])
    seconds = [{**r.phase_seconds(), **{f"engine {p.name}": p.seconds for p in r.engines[0].phases}} for r in reports]
    return {
        "way": way,
        "nbytes": reports[-1].nbytes,
        "connect_s": connect_s,
        "publish_s": statistics.median(r.total_s for r in reports),
        "worst_s": max(r.total_s for r in reports),
        "stall_s": statistics.median(stalls),
        "token_s": statistics.median(usual),
        "phases": {name: statistics.median(s.get(name, 0.0) for s in seconds) for name in seconds[0]},
    }


def reload_alone(model: Path, rounds: int) -> None:
    """In a process of its own: vLLM's reload of all tensors out of memory, and nothing else. Prints seconds."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM
    from weightcast.engines.vllm import api

    llm = LLM(model=str(model), enforce_eager=True, max_model_len=256, max_num_seqs=8, kv_cache_memory_bytes=256 << 20)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    weights, times = random_state_dict(model), []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.no_grad(), api.layerwise_reload(worker.get_model(), worker.vllm_config):
            worker.get_model().load_weights(weights.items())
        times.append(time.perf_counter() - start)
    print(MARK + json.dumps(statistics.median(times)))


def measure_reload(model: Path, rounds: int) -> float:
    command = [sys.executable, __file__, "--reload-alone", str(model), "--rounds", str(rounds)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    return float(next(line for line in lines if line.startswith(MARK)).removeprefix(MARK))


def show(rows: list[dict[str, Any]], reload_s: float, num_streams: int) -> None:
    engine = ("engine pause", "engine apply", "engine resume")
    table = Table(
        title=f"{rows[0]['nbytes'] / 1e6:.0f} MB to stock vLLM, {num_streams} streams in flight, milliseconds; "
        f"vLLM's reload by itself {reload_s * 1e3:.0f}"
    )
    for column in (
        "way",
        "publish",
        "worst",
        "gather",
        "transfer",
        "verify",
        "commit",
        "pause",
        "apply",
        "resume",
        "stall",
        "token",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        phases = [row["phases"].get(n, 0.0) for n in ("gather", "transfer", "verify", "commit", *engine)]
        numbers = [row["publish_s"], row["worst_s"], *phases, row["stall_s"], row["token_s"]]
        table.add_row(row["way"], *(f"{number * 1e3:.0f}" for number in numbers))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--ways", nargs="+", default=WAYS, help="kept: old keys and values stay")
    parser.add_argument("--json", help="append the numbers to this file")
    parser.add_argument("--reload-alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if find_spec("vllm") is None:
        print("skipped: vLLM is not installed here; run it with .venv-vllm/bin/python (make setup-vllm)")
        return
    if options.reload_alone:
        reload_alone(Path(options.reload_alone), options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_model(Path(folder) / "m", "qwen3", "bfloat16", num_hidden_layers=options.layers, **SHAPE)
        reload_s = measure_reload(model, options.rounds)
        trained, rows = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), []
        with vllm_server(model, kv_cache_nbytes=256 << 20, env={"VLLM_CPU_OMP_THREADS_BIND": "auto"}) as served:
            for way in options.ways:
                rows.append(measure(served, trained, way, options.rounds, options.streams))
        show(rows, reload_s, options.streams)
    if options.json:
        with open(options.json, "a") as file:
            file.write(json.dumps({"reload_s": reload_s, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
