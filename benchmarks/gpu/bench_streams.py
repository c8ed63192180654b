"""What does a staged round over a stream cost against the same bytes from a module? Trainer and engine are two processes on one GPU.

The stream yields the module's own parameters, so that producing a tensor costs nothing. Two publishers, each with an engine of its own,
take turns; the ratio is the median of their ratios. The last column is the trainer's extra memory on the GPU.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack

import torch
from bench_publish import Policy
from common import Table
from shapes import SHAPES, layouts

from weightcast import Publisher, StreamSource
from weightcast.sources import ModuleSource
from weightcast.testing.peer_engine import PeerEngine


def measure(table: Table, name: str, transport: str, rounds: int, window_nbytes: int) -> None:
    policy = Policy(name, torch.bfloat16)
    _, _, wanted = layouts(SHAPES[name])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sources = {
        "module": ModuleSource(policy, names=policy.names),
        "stream": StreamSource(lambda: policy.names.items(), window_nbytes=window_nbytes),
    }
    seconds: dict[str, list[float]] = {way: [] for way in sources}
    nbytes = 0
    with ExitStack() as stack:
        publishers = {}
        for way, source in sources.items():
            engine = stack.enter_context(PeerEngine())
            engine.store(wanted, device="cuda", mode="staged")
            publishers[way] = stack.enter_context(Publisher(source, [engine], transport=transport, timeout_s=60))
        for number in range(rounds + 2):
            policy.step()
            for way, publisher in publishers.items():
                torch.cuda.synchronize()
                report = publisher.publish()
                assert report.digests_match
                nbytes = report.nbytes
                if number > 1:
                    seconds[way].append(report.total_s)
        extra = torch.cuda.max_memory_allocated() - before
    ratio = statistics.median(s / m for s, m in zip(seconds["stream"], seconds["module"], strict=True))
    for way, values in seconds.items():
        note = f"x{ratio:.2f} of the module; at most {extra / 2**20:.0f} MiB more" if way == "stream" else ""
        window = f" window {window_nbytes >> 20} MiB" if way == "stream" else ""
        table.add(f"{name} {transport} staged {way}{window}", statistics.median(values) * 1e3, nbytes, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    parser.add_argument("--transports", nargs="+", default=["cuda_ipc", "nccl"])
    parser.add_argument("--window-mib", type=int, nargs="+", default=[256, 1024])
    options = parser.parse_args()
    table = Table("streams")
    for name in options.shapes:
        for transport in options.transports:
            for window in options.window_mib:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    measure(table, name, transport, options.rounds, window * 2**20)
                except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                    table.fail(f"{name} {transport} {window}", error)
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
