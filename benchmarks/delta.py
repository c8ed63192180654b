"""What do rounds that send changes cost against rounds of all values, and how many bits is a changed element?

Two tables. The first trains (AdamW, float32 masters, published in bfloat16) and writes down what each step changed: bits a changed
element, against int32 position + value and XOR of everything + zstd-1, and the processor seconds in which a trainer finds and writes
changes and an engine reads and applies them, digests included. Models: the demo's policy on the demo's task, its supervised steps; a Qwen3 of 13 M
parameters on random tokens; with --smollm FOLDER SmolLM2-135M, as ``weightcast demo smollm`` makes the folder, on the text of docs/. The
second table publishes a module to a LocalEngine behind a link of a given rate (two network namespaces, tc; Linux, root), with steps that move the
given share of the elements by a unit or two of the last place. Beside the milliseconds that pass stand those that the processors work,
trainer and engine together: on a machine that has other work the first say little.

    python benchmarks/delta.py [--mib 256] [--rounds 5] [--gbit 1 10] [--share 0.01 0.03] [--steps 5] [--smollm FOLDER]
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import zstandard
from publish import PipedEngine, engine_process, tensors_of
from rich.console import Console
from rich.table import Table
from tests.support.network import Cable, enter, obstacle
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from weightcast import Publisher
from weightcast.delta.form import Bytes
from weightcast.layout import Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy
from weightcast.report.model import Report
from weightcast.sources import ModuleSource
from weightcast.transports.buckets import schedule
from weightcast.transports.changed import Changing
from weightcast.transports.counted import counted
from weightcast.transports.kept import Change, KeptBuckets, forms_of
from weightcast.transports.told import Told
from weightcast_demo.grpo import Learner
from weightcast_demo.policy import answer_logprobs, build_policy
from weightcast_demo.task import SortingDigits, answers

BUCKET_NBYTES = 8 * 2**20
COUNT = 200
"""Tensors of the module that is published."""


class Step(NamedTuple):
    """What became of one optimizer step's changes. Rates are bytes of all values a processor second."""

    share: float
    bits: float
    bits_xor: float
    find: float
    apply: float
    xor: float


def published(model: torch.nn.Module) -> Bytes:
    """What is published of a model, as one row of bytes."""
    flat = [value.detach().to(torch.bfloat16).reshape(-1) for value in model.parameters()]
    return torch.cat(flat).view(torch.uint8).numpy()


def stepping(model: Any, lr: float, steps: int, skip: int, losses: Iterator[torch.Tensor]) -> Iterator[Bytes]:
    """The published bytes after each step; the first steps, in which Adam's moments begin, are left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(skip + steps + 1):
        next(losses).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number >= skip:
            yield published(model)


def qwen(lr: float, steps: int) -> Iterator[Bytes]:
    config = Qwen3Config(
        vocab_size=4096, hidden_size=384, intermediate_size=1152, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)

    def losses() -> Iterator[torch.Tensor]:
        while True:
            tokens = torch.randint(0, 4096, (4, 64))
            yield model(input_ids=tokens, labels=tokens).loss

    yield from stepping(model, lr, steps, 9, losses())


def policy(lr: float, steps: int) -> Iterator[Bytes]:
    """The demo's policy, once it has learned something at the demo's own pace."""
    model, prompts = build_policy(0), SortingDigits(0)
    Learner(model).warm_up(prompts, enough=0.2, max_steps=100, batch=64)

    def losses() -> Iterator[torch.Tensor]:
        while True:
            questions = prompts.prompts(64)
            yield -answer_logprobs(model, questions, answers(questions)).mean()

    yield from stepping(model, lr, steps, 9, losses())


def smollm(folder: Path, before: int, lr: float, steps: int) -> Iterator[Bytes]:
    """SmolLM2-135M, tuned on the text of this project's documents: a piece of 64 tokens a step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "\n".join(path.read_text() for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md")))
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids[0]
    generator = torch.Generator().manual_seed(0)

    def losses() -> Iterator[torch.Tensor]:
        while True:
            starts = torch.randint(0, len(tokens) - 64, (1,), generator=generator).tolist()
            batch = torch.stack([tokens[start : start + 64] for start in starts])
            yield model(input_ids=batch, labels=batch).loss

    yield from stepping(model, lr, steps, before, losses())


class Ways:
    """A trainer's kept buckets of one row of bytes, and an engine's memory that holds what was sent last."""

    def __init__(self, first: Bytes) -> None:
        numel = len(first) // 2
        manifest = Manifest.of([TensorSpec(name="w", dtype="bfloat16", shape=(numel,))])
        place = {"storage": 0, "dtype": "bfloat16", "offset": 0, "strides": (1,)}
        sides = {f"{side}_{name}": value for side in ("src", "dst") for name, value in place.items()}
        copy = Copy(region=Region(name="w", offsets=(0,), sizes=(numel,)), **sides)
        self._buckets = schedule([copy], BUCKET_NBYTES)
        forms = forms_of(self._buckets)
        self._kept = KeptBuckets(self._buckets, forms, manifest)
        self.memory, self._number = Memory([torch.from_numpy(first.copy())]), 0
        counts = counted(self._buckets, forms, manifest) or [None] * len(forms)
        zipped = zip(self._buckets, forms, counts, strict=True)
        self._changings = [Changing(bucket, form, self.memory, count) for bucket, form, count in zipped]
        self.find(first)

    def find(self, values: Bytes) -> list[Change | None]:
        self._number += 1
        starts = itertools.accumulate((bucket.nbytes for bucket in self._buckets), initial=0)
        return [
            self._kept.take(bucket, self._number, lambda start=start: [values[start : start + BUCKET_NBYTES]])  # type: ignore[misc]
            for bucket, start in zip(range(len(self._buckets)), starts, strict=False)
        ]

    def apply(self, changes: list[Change | None]) -> None:
        for changing, change in zip(self._changings, changes, strict=True):
            assert change is not None
            assert change.data is not None
            changing.apply([changing.read(Told(memoryview(change.data)))], lambda work: _call(work))


def _call(work: Callable[[], object]) -> None:
    work()


def measured(ways: Ways, old: Bytes, new: Bytes) -> Step:
    """The changes of one step, bucket by bucket."""
    clock = time.thread_time()
    found = ways.find(new)
    find_s = time.thread_time() - clock
    clock = time.thread_time()
    ways.apply(found)
    apply_s = time.thread_time() - clock
    assert np.array_equal(ways.memory.storages[0].numpy(), new)
    count = int(np.count_nonzero(old.view(np.uint16) != new.view(np.uint16)))
    nbytes = sum(len(change.data) for change in found if change is not None and change.data is not None)
    clock = time.thread_time()
    xor = len(zstandard.ZstdCompressor(level=1).compress((old ^ new).tobytes()))
    xor_s = time.thread_time() - clock
    rates = [len(old) / seconds / 1e9 for seconds in (find_s, apply_s, xor_s)]
    return Step(2 * count / len(old), 8 * nbytes / count, 8 * xor / count, *rates)


def codec_table(console: Console, options: argparse.Namespace) -> None:
    table = Table(title="Changes of real optimizer steps, medians; GB of all values a processor second")
    columns = ("model", "lr", "changed", "bits", "bits of XOR + zstd", "of int32 + value", "find", "apply", "XOR")
    for column in columns:
        table.add_column(column, justify="right")
    sources: dict[str, Callable[[float, int], Iterator[Bytes]]] = {"policy, 0.6 M": policy, "Qwen3, 13 M": qwen}
    if options.smollm:
        sources = {"SmolLM2, 135 M": partial(smollm, options.smollm, options.before)}
    for name, source in sources.items():
        for lr in options.lr:
            images = source(lr, options.steps)
            old = next(images)
            ways, steps = Ways(old), []
            for new in images:
                steps.append(measured(ways, old, new))
                old = new
            medians = Step(*(statistics.median(column) for column in zip(*steps, strict=True)))
            cells = [f"{medians.bits:.1f}", f"{medians.bits_xor:.1f}", "48"]
            rates = [f"{rate:.2f}" for rate in (medians.find, medians.apply, medians.xor)]
            table.add_row(name, f"{lr:g}", f"{100 * medians.share:.2f} %", *cells, *rates)
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


class Timed(NamedTuple):
    """A round, and for how many seconds processors worked for trainer and engine meanwhile."""

    report: Report
    worked_s: float


def worked_s(*pids: int) -> float:
    """For how many seconds processors have worked for these processes."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def rounds_over(gbit: float, nbytes: int, rounds: int, share: float, delta: bool | str, mode: str) -> list[Timed]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with link(gbit) as (netns, here):
        child = context.Process(target=far_engine, args=(netns, theirs, COUNT, nbytes, mode, 1))
        child.start()
        theirs.close()
        assert child.pid is not None
        try:
            return _published(ours, here, nbytes, rounds, share, delta, mode, child.pid)
        finally:
            ours.close()
            child.join(20)
            child.kill()


def _published(
    ours: Connection, here: str, nbytes: int, rounds: int, share: float, delta: bool | str, mode: str, engine: int
) -> list[Timed]:
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
            before = worked_s(os.getpid(), engine)
            report = publisher.publish()
            reports.append(Timed(report, worked_s(os.getpid(), engine) - before))
            assert report.digests_match
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
    for column in ("link", "mode", "changed", "way", "publish", "transfer", "commit", "worked", "sent", "dense / this"):
        table.add_column(column, justify="right")
    for gbit in options.gbit:
        for mode in options.modes:
            dense_s = 0.0
            ways = [(options.share[0], False), *((share, delta) for share in options.share for delta in (True, "auto"))]
            for share, delta in ways:
                timed = rounds_over(gbit, nbytes, options.rounds, share, delta, mode)
                reports = [each.report for each in timed]
                total_s = statistics.median(report.total_s for report in reports)
                dense_s = dense_s or total_s
                phases = [
                    statistics.median(r.phase_seconds().get(name, 0.0) for r in reports)
                    for name in ("transfer", "commit")
                ]
                worker = reports[-1].engines[0].workers[0]
                way = {False: "dense", True: "delta"}.get(delta, f"auto: {worker.codec}")  # type: ignore[call-overload]
                cells = [f"{1e3 * seconds:.0f}" for seconds in (total_s, *phases)]
                cells.append(f"{1e3 * statistics.median(each.worked_s for each in timed):.0f}")
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
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5])
    parser.add_argument("--smollm", type=Path)
    parser.add_argument("--before", type=int, default=45, help="steps of SmolLM2 before those that are measured")
    parser.add_argument("--gbit", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--share", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--modes", nargs="+", default=["staged", "in_place"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if options.steps:
        codec_table(console, options)
    if options.gbit and (why := obstacle()):
        console.print(f"no links of a given rate: {why}")
    elif options.gbit:
        rounds_table(console, options)


if __name__ == "__main__":
    main()
