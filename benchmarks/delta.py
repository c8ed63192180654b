"""What do rounds that send changes cost against rounds of all values, and how many bits is a changed element?

Two tables. The first trains a small Qwen3 (random tokens, AdamW, float32 masters, published in bfloat16) and writes down each step's
changes: bits a changed element, and the time to find, write and read them, against int32 position + value, and XOR of everything +
zstd-1. The second publishes a module to a LocalEngine behind a link of a given rate (two network namespaces, tc; Linux, root), with
steps that move the given share of the elements by a unit or two of the last place.

    python benchmarks/delta.py [--mib 256] [--rounds 5] [--gbit 1 10] [--share 0.01 0.03]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import zstandard
from publish import PipedEngine, engine_process, tensors_of
from rich.console import Console
from rich.table import Table
from tests.support.network import Cable, enter, obstacle
from transformers import AutoModelForCausalLM, Qwen3Config

from weightcast import Publisher
from weightcast.cpu import comparison_for
from weightcast.delta import Form, Kind, Stretch, decode, differing_by_numpy, encode, find
from weightcast.delta.form import Bytes
from weightcast.report.model import Report
from weightcast.sources import ModuleSource

BUCKET_NBYTES = 8 * 2**20
KERNEL = comparison_for(True)
DIFFERING = differing_by_numpy if KERNEL is None else KERNEL.differing
COUNT = 200
"""Tensors of the module that is published."""


class Step(NamedTuple):
    """What became of one optimizer step's changes. Rates are bytes of all values a second."""

    share: float
    bits: float
    bits_xor: float
    find: float
    encode: float
    decode: float
    xor: float


def trained(lr: float, steps: int) -> Iterator[Bytes]:
    """The published bytes of a small model after each step; the first steps, in which Adam's moments begin, are left out."""
    config = Qwen3Config(
        vocab_size=4096, hidden_size=384, intermediate_size=1152, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(steps + 10):
        tokens = torch.randint(0, 4096, (4, 64))
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number >= 9:
            flat = [value.detach().to(torch.bfloat16).reshape(-1) for value in model.parameters()]
            yield torch.cat(flat).view(torch.uint8).numpy()


def measured(old: Bytes, new: Bytes) -> Step:
    """The changes of one step, bucket by bucket."""
    count = nbytes = 0
    times = [0.0] * 3
    for start in range(0, len(old), BUCKET_NBYTES):
        was, now = old[start : start + BUCKET_NBYTES], new[start : start + BUCKET_NBYTES]
        form = Form([Stretch(0, len(was), Kind(2, False))], len(was))
        clock = time.perf_counter()
        found = find(form, was, [now], DIFFERING)
        times[0] += time.perf_counter() - clock
        clock = time.perf_counter()
        data = encode(form, found)
        times[1] += time.perf_counter() - clock
        assert data is not None
        clock = time.perf_counter()
        decode(form, data)
        times[2] += time.perf_counter() - clock
        count += sum(len(one.positions) for one in found)
        nbytes += len(data)
    clock = time.perf_counter()
    xor = len(zstandard.ZstdCompressor(level=1).compress((old ^ new).tobytes()))
    xor_s = time.perf_counter() - clock
    rates = [len(old) / seconds / 1e9 for seconds in (*times, xor_s)]
    return Step(2 * count / len(old), 8 * nbytes / count, 8 * xor / count, *rates)


def codec_table(console: Console, steps: int) -> None:
    table = Table(title="Changes of real optimizer steps, medians")
    for column in (
        "lr",
        "changed",
        "bits",
        "bits of XOR + zstd",
        "of int32 + value",
        "find",
        "encode",
        "decode",
        "XOR",
    ):
        table.add_column(column, justify="right")
    for lr in (1e-6, 3e-6, 1e-5):
        images = list(trained(lr, steps))
        found = [measured(old, new) for old, new in itertools.pairwise(images)]
        medians = Step(*(statistics.median(column) for column in zip(*found, strict=True)))
        cells = [f"{medians.bits:.1f}", f"{medians.bits_xor:.1f}", "48"]
        rates = [f"{rate:.2f} GB/s" for rate in (medians.find, medians.encode, medians.decode, medians.xor)]
        table.add_row(f"{lr:g}", f"{100 * medians.share:.2f} %", *cells, *rates)
    console.print(table)


def far_engine(netns: str, *arguments: object) -> None:
    enter(netns)
    engine_process(*arguments)  # type: ignore[arg-type]


@contextmanager
def link(gbit: float) -> Iterator[tuple[str, str]]:
    """A network namespace and this side's address of a cable to it, which carries so much in each direction."""
    with Cable() as cable:
        shaped = ["root", "tbf", "rate", f"{gbit:g}gbit", "burst", "1mb", "latency", "50ms"]
        device = f"{cable.netns}a"
        subprocess.run(["tc", "qdisc", "add", "dev", device, *shaped], check=True)
        inside = ["ip", "netns", "exec", cable.netns]
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", f"{cable.netns}b", *shaped], check=True)
        yield cable.netns, cable.here


def rounds_over(gbit: float, nbytes: int, rounds: int, share: float, delta: bool | str, mode: str) -> list[Report]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with link(gbit) as (netns, here):
        child = context.Process(target=far_engine, args=(netns, theirs, COUNT, nbytes, mode, 1))
        child.start()
        theirs.close()
        try:
            return _published(ours, here, nbytes, rounds, share, delta, mode)
        finally:
            ours.close()
            child.join(20)
            child.kill()


def _published(
    ours: Connection, here: str, nbytes: int, rounds: int, share: float, delta: bool | str, mode: str
) -> list[Report]:
    module = torch.nn.Module()
    module.values = torch.nn.ParameterList([torch.nn.Parameter(value) for value in tensors_of(COUNT, nbytes).values()])
    names = dict(zip(tensors_of(COUNT, 2 * COUNT), module.values, strict=True))
    settings = {"transport": "tcp", "address": here, "mode": mode, "timeout_s": 300, "delta": delta}
    reports = []
    with Publisher(ModuleSource(module, names=names), [PipedEngine(ours)], **settings) as publisher:
        publisher.publish()
        publisher.publish()
        for _ in range(rounds):
            for value in module.values:
                _step(value.detach(), share)
            reports.append(publisher.publish())
            assert reports[-1].digests_match
    return reports


def _step(value: torch.Tensor, share: float) -> None:
    bits = value.view(torch.int16).reshape(-1).numpy()
    rng = np.random.default_rng()
    where = np.flatnonzero(rng.random(len(bits), dtype=np.float32) < share)
    bits[where] += rng.choice(np.array([1, -1, 2, -2], np.int16), len(where), p=[0.46, 0.46, 0.04, 0.04])


def rounds_table(console: Console, options: argparse.Namespace) -> None:
    nbytes = options.mib * 2**20
    table = Table(
        title=f"publish() of {options.mib} MiB of bf16 over tcp, medians of {options.rounds} rounds, milliseconds"
    )
    for column in ("link", "mode", "changed", "way", "publish", "transfer", "commit", "sent", "dense / this"):
        table.add_column(column, justify="right")
    for gbit in options.gbit:
        for mode in options.modes:
            dense_s = 0.0
            ways = [(options.share[0], False), *((share, delta) for share in options.share for delta in (True, "auto"))]
            for share, delta in ways:
                reports = rounds_over(gbit, nbytes, options.rounds, share, delta, mode)
                total_s = statistics.median(report.total_s for report in reports)
                dense_s = dense_s or total_s
                phases = [
                    statistics.median(r.phase_seconds().get(name, 0.0) for r in reports)
                    for name in ("transfer", "commit")
                ]
                worker = reports[-1].engines[0].workers[0]
                way = {False: "dense", True: "delta"}.get(delta, f"auto: {worker.codec}")  # type: ignore[call-overload]
                cells = [f"{1e3 * seconds:.0f}" for seconds in (total_s, *phases)]
                sent = f"{worker.sent_nbytes / 1e6:.2f} MB"
                table.add_row(
                    f"{gbit:g} Gbit/s", mode, f"{100 * share:g} %", way, *cells, sent, f"{dense_s / total_s:.1f}"
                )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gbit", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--share", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--modes", nargs="+", default=["staged", "in_place"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if options.steps:
        codec_table(console, options.steps)
    if options.gbit and (why := obstacle()):
        console.print(f"no links of a given rate: {why}")
    elif options.gbit:
        rounds_table(console, options)


if __name__ == "__main__":
    main()
