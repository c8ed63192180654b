"""How long does the set-up of a large fleet take, and how much memory: plans from many trainer ranks to many workers, on one core?

The model has the shape of Kimi K2 (70,763 tensors). Trainer: experts are spread over 32 groups, each cut by rows over the ranks of its
group; everything else is cut by rows over all ranks. Engines: 32 workers each; a worker wants its share of the experts and all the rest.
Nothing of this has weights: ranks and workers say what they hold and want, as they do on the wire.

Columns: trainer ranks, workers, holdings, copies of all workers' plans; seconds of the trainer's core to understand the ranks, to plan for
all workers and to write what they are sent; bytes that a worker is sent on average; seconds of a worker's core from these bytes to the same
plan; the most memory that the trainer took.

    python benchmarks/scale_plans.py [--ranks 64 256] [--workers 128] [--layers 61]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from weightcast.layout.columns import pack
from weightcast.layout.table import LayoutTable, PlacementTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import DTYPE_NUMBERS, ITEMSIZES
from weightcast.plan import Holdings, HoldingTable, Plan, compile_plan
from weightcast.untrusted.known import known

HIDDEN, EXPERTS, GROUPS = 7168, 384, 32
VISION_BLOCKS = 65
COLUMNS = ("ranks", "workers", "holdings", "copies", "learn s", "plan s", "write s", "KiB a worker", "worker s", "MiB")
T = TypeVar("T")


def manifest_of(layers: int) -> Manifest:
    """The tensors of a model with the shape of Kimi K2 and a vision tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (163840, HIDDEN),
        "lm_head.weight": (163840, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        for name, shape in _layer(is_dense=layer == 0):
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes |= {f"vision.blocks.{block}.{i}.weight": (1152, 1152) for block in range(VISION_BLOCKS) for i in range(12)}
    shapes |= {f"vision.projector.{i}.weight": (1152, HIDDEN) for i in range(8)}
    return Manifest.of(TensorSpec(name=name, dtype="bfloat16", shape=shape) for name, shape in shapes.items())


def _layer(*, is_dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("input_layernorm.weight", (HIDDEN,)), ("post_attention_layernorm.weight", (HIDDEN,)))
    yield from (("self_attn.q_a_proj.weight", (1536, HIDDEN)), ("self_attn.q_a_layernorm.weight", (1536,)))
    yield from (("self_attn.q_b_proj.weight", (12288, 1536)), ("self_attn.kv_a_proj_with_mqa.weight", (576, HIDDEN)))
    yield from (("self_attn.kv_a_layernorm.weight", (512,)), ("self_attn.kv_b_proj.weight", (16384, 512)))
    yield ("self_attn.o_proj.weight", (HIDDEN, 8192))
    parts = ["mlp"] if is_dense else ["mlp.shared_experts", *(f"mlp.experts.{i}" for i in range(EXPERTS))]
    width = 18432 if is_dense else 2048
    for part in parts:
        yield from ((f"{part}.gate_proj.weight", (width, HIDDEN)), (f"{part}.up_proj.weight", (width, HIDDEN)))
        yield (f"{part}.down_proj.weight", (HIDDEN, width))
    if not is_dense:
        yield from (("mlp.gate.weight", (EXPERTS, HIDDEN)), ("mlp.gate.e_score_correction_bias", (EXPERTS,)))


class Layouts:
    """What ranks hold and workers want, made as columns: making an object for each placement would take longer than planning."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        experts = [
            int(s.name.split(".experts.")[1].split(".")[0]) if ".experts." in s.name else -1 for s in manifest.tensors
        ]
        self._group_of = np.array([-1 if expert < 0 else expert * GROUPS // EXPERTS for expert in experts])

    def held_by(self, rank: int, ranks: int) -> LayoutTable:
        """Rows of the experts of the rank's group, or of all its groups where there are more groups than ranks, and of everything else."""
        groups = min(ranks, GROUPS)
        group, place = rank % groups, rank // groups
        is_expert = self._group_of >= 0
        parts = np.where(is_expert, ranks // groups, ranks)
        places = np.where(is_expert, place, rank)
        return self._rows(places, parts, ~is_expert | (self._group_of % groups == group))

    def wanted_by(self, worker: int) -> LayoutTable:
        """All of the experts of the worker's group, and everything else."""
        ones = np.ones(len(self._manifest), np.int64)
        return self._rows(0 * ones, ones, (self._group_of < 0) | (self._group_of == worker % GROUPS))

    def _rows(self, places: np.ndarray, parts: np.ndarray, chosen: np.ndarray) -> LayoutTable:
        """A placement of each chosen tensor that has any rows: those of one of so many parts. Each has a storage of its own."""
        shapes = self._manifest.shapes
        rows, width = shapes
        step = -(-rows // parts)
        starts = np.minimum(places * step, rows)
        counts = np.minimum(starts + step, rows) - starts
        tensor = np.flatnonzero(chosen & (counts > 0))
        starts, counts, width = starts[tensor], counts[tensor], width[tensor]
        dtype = np.full(len(tensor), DTYPE_NUMBERS["bfloat16"])
        zeros, ones = np.zeros_like(tensor), np.ones_like(tensor)
        numbers = [tensor, dtype, np.arange(len(tensor)), zeros, starts, zeros, counts, width, width, ones]
        is_vector = self._manifest.num_dims[tensor] == 1
        numbers[8], numbers[9] = np.where(is_vector, 1, width), np.where(is_vector, 0, 1)
        return LayoutTable(
            placements=PlacementTable.packed(np.array(numbers, np.int64), 2),
            num_storages=len(tensor),
            storage_nbytes=pack((counts * width * ITEMSIZES[dtype])[None])[0],
        )


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work gives, and how long the core took."""
    start = time.process_time()
    return work(), time.process_time() - start


def measure(ranks: int, workers: int, layers: int) -> list[str]:
    """One line of the table."""
    manifest = manifest_of(layers)
    layouts = Layouts(manifest)
    encode = msgspec.msgpack.encode
    held = [encode(layouts.held_by(rank, ranks)) for rank in range(ranks)]
    wanted = [encode(layouts.wanted_by(worker)) for worker in range(workers)]

    def learn() -> Holdings:
        tables = {rank: msgspec.msgpack.decode(data, type=known(LayoutTable)) for rank, data in enumerate(held)}
        for table in tables.values():
            table.check(manifest)
        return Holdings.of(manifest, tables)

    def plan_all() -> dict[LayoutTable, Plan]:
        plans: dict[LayoutTable, Plan] = {}
        for data in wanted:
            landings = msgspec.msgpack.decode(data, type=known(LayoutTable))
            landings.check_landings(manifest)
            if landings not in plans:
                plans[landings] = compile_plan(manifest, holdings, landings)
            assert plans[landings].digest
        return plans

    holdings, learn_s = timed(learn)
    plans, plan_s = timed(plan_all)
    sent, write_s = timed(lambda: [len(encode(plan.holdings)) for plan in plans.values()])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    landings, plan = next(iter(plans.items()))
    told = encode(plan.holdings)

    def compile_as_worker() -> str:
        table = msgspec.msgpack.decode(told, type=known(HoldingTable))
        return compile_plan(manifest, Holdings.told(manifest, table), landings).digest

    digest, worker_s = timed(compile_as_worker)
    assert digest == plan.digest
    copies = sum(len(some) for plan in plans.values() for some in plan.values()) * workers // len(plans)
    numbers = (
        ranks,
        workers,
        len(holdings.ranks),
        copies,
        learn_s,
        plan_s,
        write_s,
        sum(sent) / len(sent) / 1024,
        worker_s,
        most,
    )
    return [f"{number:,.2f}" if isinstance(number, float) and number < 100 else f"{number:,.0f}" for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--workers", type=int, nargs="+", default=[128])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--line", action="store_true", help="print one line only, for the process that measures it")
    options = parser.parse_args()
    if options.line:
        print("\t".join(measure(options.ranks[0], options.workers[0], options.layers)))
        return
    table = Table(*COLUMNS, title=f"{len(manifest_of(options.layers)):,} tensors")
    for ranks in options.ranks:
        for workers in options.workers:
            command = [
                sys.executable,
                __file__,
                "--line",
                f"--layers={options.layers}",
                f"--ranks={ranks}",
                f"--workers={workers}",
            ]
            done = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            table.add_row(*done.stdout.strip().split("\t"))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
