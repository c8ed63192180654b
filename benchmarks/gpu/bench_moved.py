"""What does a round cost whose weights were moved since the one before? A module on a GPU, over cuda_ipc, beside rounds in which it lies still.

"reused": the allocator gives the same memory, as it mostly does; "fresh": all memory was given back to the driver in between.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from bench_publish import Policy
from common import Medians, Table
from shapes import SHAPES, layouts

from weightcast import Publisher
from weightcast.sources import ModuleSource
from weightcast.testing.peer_engine import PeerEngine


def lie_still(policy: Policy) -> None:
    pass


def swap_around(policy: Policy) -> None:
    """Each tensor has other memory, all of which the allocator had before."""
    for value in policy.values:
        value.data = value.data.clone()


def offload(policy: Policy) -> None:
    """To the host and back; the driver had the memory in between."""
    for value in policy.values:
        value.data = value.data.cpu()
    torch.cuda.empty_cache()
    for value in policy.values:
        value.data = value.data.cuda()


MOVES = {"still": lie_still, "reused": swap_around, "fresh": offload}


def measure(table: Table, name: str, mode: str, rounds: int, hold: str) -> None:
    policy = Policy(name, torch.bfloat16)
    _, _, wanted = layouts(SHAPES[name])
    settings = {"hold": hold} if hold else {}
    with PeerEngine() as engine:
        engine.store(wanted, device="cuda", mode=mode)
        source = ModuleSource(policy, names=policy.names)
        with Publisher(source, [engine], transport="cuda_ipc", timeout_s=60, **settings) as publisher:  # type: ignore[arg-type]
            for how, move in MOVES.items():
                reports, walls = [], []
                for _ in range(rounds + 2):
                    policy.step()
                    move(policy)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    reports.append(publisher.publish())
                    walls.append((time.perf_counter() - start) * 1e3)
                    assert reports[-1].digests_match
                total, phases, _ = Medians.of(reports[2:])
                label = f"{name} {mode} {how}{' hold=' + hold if hold else ''}"
                table.add(label, statistics.median(walls[2:]), reports[-1].nbytes, f"report {total:.1f} ms; {phases}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    parser.add_argument("--modes", nargs="+", default=["in_place"])
    parser.add_argument("--hold", default="")
    options = parser.parse_args()
    table = Table("moved")
    for name in options.shapes:
        for mode in options.modes:
            try:
                measure(table, name, mode, options.rounds, options.hold)
            except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                table.fail(f"{name} {mode}", error)
            torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
