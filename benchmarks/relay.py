"""How long do engines behind one slow link take to get a model: one of them, several, and several that feed each other?

A trainer and a site of several engines, each a LocalEngine in a process of its own, with one link of a given rate between trainer and
site (two network namespaces, tc; Linux, root). Inside the site the network is the host's own.

    python benchmarks/relay.py [--mib 256] [--engines 8] [--rounds 5] [--gbit 1]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from delta import far_engine, link
from publish import PipedEngine, tensors_of
from rich.console import Console
from rich.table import Table
from tests.support.network import obstacle

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.report.model import Report

COUNT = 200
"""Tensors of what is published."""


@contextmanager
def engines_in(netns: str, count: int, nbytes: int, mode: str) -> Iterator[list[PipedEngine]]:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        engines = []
        for number in range(count):
            ours, theirs = context.Pipe()
            child = context.Process(target=far_engine, args=(netns, theirs, COUNT, nbytes, mode, 1))
            child.start()
            theirs.close()
            stack.callback(child.kill)
            stack.callback(child.join, 20)
            stack.callback(ours.close)
            engine = PipedEngine(ours)
            engine.name = f"engine {number}"
            engines.append(engine)
        for engine in engines:
            engine.status(Deadline(300))  # processes that all begin at once take their time
        yield engines


def rounds_over(gbit: float, count: int, nbytes: int, rounds: int, mode: str, *, relay: bool) -> list[Report]:
    source = tensors_of(COUNT, nbytes)
    with link(gbit) as (netns, here), engines_in(netns, count, nbytes, mode) as engines:
        sites: Any = [[engine.name for engine in engines]] if relay else False
        settings: dict[str, Any] = {"transport": "tcp", "address": here, "mode": mode, "timeout_s": 300, "relay": sites}
        reports = []
        with Publisher(source, engines, **settings) as publisher:
            for number in range(2 + rounds):
                for value in source.values():
                    value.view(torch.int16).bitwise_xor_(1 + number)
                reports.append(publisher.publish())
                assert reports[-1].digests_match
        return reports[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--engines", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--modes", nargs="+", default=["staged", "in_place"])
    options = parser.parse_args()
    if why := obstacle():
        sys.exit(f"no links of a given rate: {why}")
    torch.set_num_threads(1)
    title = (
        f"publish() of {options.mib} MiB behind one link of {options.gbit:g} Gbit/s, medians of {options.rounds} rounds"
    )
    table = Table(title=title)
    for column in ("mode", "engines", "relay", "publish, ms", "slowest round", "over the link", "against one engine"):
        table.add_column(column, justify="right")
    for mode in options.modes:
        alone_s = 0.0
        for count, relay in ((1, False), (options.engines, False), (options.engines, True)):
            reports = rounds_over(options.gbit, count, options.mib * 2**20, options.rounds, mode, relay=relay)
            times = [report.total_s for report in reports]
            alone_s = alone_s or statistics.median(times)
            sent = sum(worker.sent_nbytes for engine in reports[-1].engines for worker in engine.workers)
            median_s = statistics.median(times)
            cells = [f"{1e3 * median_s:.0f}", f"{1e3 * max(times):.0f}", f"{sent / 2**20:.0f} MiB"]
            table.add_row(mode, str(count), "yes" if relay else "no", *cells, f"{median_s / alone_s:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
