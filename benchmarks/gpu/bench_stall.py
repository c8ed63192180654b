"""How long do requests in flight stand still while stock vLLM takes an 8B model? ``vllm serve``, four streams, one GPU.

The clients are a process of their own and note when each token comes. A row: the usual gap between two tokens, the longest gap
of each round (median over rounds) and the difference, the stall; beside it what the engine says of its commit.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import httpx
import torch
from bench_vllm import GRAPHS, Trainer, config_folder
from common import Table, end_cleanly_when_terminated
from gpu_vllm import vllm_server
from shapes import SHAPES

from weightcast import Publisher
from weightcast.report.model import Report
from weightcast.sources import ModuleSource
from weightcast.testing.ranks import Peer
from weightcast.testing.tokenizer import build_tokenizer

NUM_STREAMS = 4
WAYS = {
    "staged, two shadows, keys and values kept": {"mode": "staged", "shadows": 2, "clear_cache": False},
    "the same, between two steps, without a pause": {
        "mode": "staged",
        "shadows": 2,
        "clear_cache": False,
        "pause": "none",
    },
    "staged, two shadows": {"mode": "staged", "shadows": 2},
    "staged": {"mode": "staged"},
    "in place": {"mode": "in_place"},
}


class Clients:
    """Streams without end; lives in a process of its own."""

    def start(self, url: str) -> None:
        self._times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._stream, args=(url, number, times), daemon=True)
            for number, times in enumerate(self._times)
        ]
        for thread in self._threads:
            thread.start()

    def _stream(self, url: str, number: int, times: list[float]) -> None:
        body = {
            "model": "policy", "prompt": [number + 11] * 16, "max_tokens": 3000, "ignore_eos": True, "stream": True,
            "temperature": 0, "allowed_token_ids": list(range(10, 200)),
        }  # fmt: skip
        while not self._ended.wait(0.05):
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60, trust_env=False) as answer:
                for line in answer.iter_lines():
                    if self._ended.is_set():
                        break
                    if line.startswith("data:"):
                        times.append(time.monotonic())

    def end(self) -> None:
        """Leave the server."""
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def gaps(self, start: float, end: float) -> list[float]:
        """Seconds between two tokens of a stream, for all pairs that touch the span."""
        return [
            after - before
            for times in self._times
            for before, after in itertools.pairwise(list(times))
            if after >= start and before <= end and after - before < 5
        ]


def measure(table: Table, trainer: Trainer, way: str, server: object, clients: Peer, rounds: int) -> None:
    reports: list[Report] = []
    stalls, longest, usual = [], [], []
    source = ModuleSource(trainer, names=trainer.names)
    with Publisher(source, [server.url], token=server.token, timeout_s=60, **WAYS[way]) as publisher:  # type: ignore[attr-defined, arg-type]
        publisher.publish()
        publisher.publish()
        for _ in range(rounds):
            time.sleep(0.6)
            trainer.step()
            torch.cuda.synchronize()
            start = time.monotonic()
            reports.append(publisher.publish())
            end = time.monotonic()
            assert reports[-1].digests_match
            time.sleep(0.6)
            usual.append(statistics.median(clients.call("gaps", end + 0.2, end + 0.55)))
            longest.append(max(clients.call("gaps", start, end + 0.03)))
            stalls.append(longest[-1] - usual[-1])
    phases = {
        p.name: round(
            statistics.median([q.seconds for r in reports for q in r.engines[0].phases if q.name == p.name]) * 1e3, 2
        )
        for p in reports[0].engines[0].phases
    }
    shadow = reports[-1].engines[0].workers[0]
    note = (
        f"usual {statistics.median(usual) * 1e3:.1f} ms, longest {statistics.median(longest) * 1e3:.1f} ms; engine {phases}; "
        f"publish {statistics.median(r.total_s for r in reports) * 1e3:.1f} ms; {shadow.shadow_nbytes / 1e9:.1f} GB in {shadow.shadow or 'no shadow'}"
    )
    table.add(f"stall, {way}", statistics.median(stalls) * 1e3, reports[-1].nbytes, note)


def main() -> None:
    end_cleanly_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("stall")
    trainer = Trainer(SHAPES[options.shape])
    with tempfile.TemporaryDirectory() as name, Peer(Clients) as clients:
        folder = config_folder(SHAPES[options.shape], Path(name) / "m")
        build_tokenizer().save_pretrained(folder)
        flags = ["--load-format", "dummy", "--kv-cache-memory-bytes", str(2 << 30), "--max-model-len", "4096"]
        graphs = str(GRAPHS).replace("'", '"')
        start = time.monotonic()
        with vllm_server(folder, "weightcast", *flags, "--compilation-config", graphs) as server:
            print(f"{options.shape}: server up in {time.monotonic() - start:.1f} s", flush=True)
            clients.call("start", server.url)
            time.sleep(1.5)
            for way in WAYS:
                try:
                    measure(table, trainer, way, server, clients, options.rounds)
                except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                    table.fail(way, error)
            clients.call("end", timeout_s=60)
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
