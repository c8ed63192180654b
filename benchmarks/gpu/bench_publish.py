"""publish() end to end, trainer and engine as two processes on one GPU, against the plain foreach copy of the same bytes.

The engine has no model code: its live weights are storages as vLLM fuses parameters. Every round is proven by digests on both
sides; "prepared": the trainer's was begun before publish(). Rows: the median of publish(), its phases, what the engine's copy
took, and the ratio to torch._foreach_copy_.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import Medians, Table, gpu_ms, reports_of
from shapes import SHAPES, groups, layouts
from torch import nn

from weightcast import Publisher
from weightcast.report.model import Report
from weightcast.sources import ModuleSource
from weightcast.testing.peer_engine import PeerEngine

PREPARED = "in place, prepared"
WAYS = {
    "in place": {"mode": "in_place"},
    PREPARED: {"mode": "in_place"},
    "staged": {"mode": "staged"},
    "staged, two shadows": {"mode": "staged", "shadows": 2},
}


class Policy(nn.Module):
    """Parameters of a shape, each in a storage of its own, as an optimizer has them."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.names: dict[str, torch.Tensor] = {}
        self.values = nn.ParameterList()
        for group in groups(SHAPES[name]):
            for tensor_name, shape in group:
                value = nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype), requires_grad=False)
                self.values.append(value)
                self.names[tensor_name] = value

    def step(self) -> None:
        torch._foreach_neg_(list(self.values))


def check(engine: PeerEngine, policy: Policy, name: str) -> None:
    """The bytes of two fused parameters, looked at one by one."""
    numbers = [0, 1]
    for number, got in zip(numbers, engine.peer.call("storages", numbers, timeout_s=120), strict=True):
        group = groups(SHAPES[name])[number]
        parts = [policy.names[tensor].to(torch.bfloat16).reshape(-1).view(torch.uint8).cpu() for tensor, _ in group]
        assert torch.cat(parts).numpy().tobytes() == got, f"parameter {number} is wrong"


def measure(
    table: Table, engine: PeerEngine, policy: Policy, name: str, way: str, transport: str, rounds: int, plain_ms: float
) -> None:
    _, _, wanted = layouts(SHAPES[name])
    source = ModuleSource(policy, dtype=torch.bfloat16, names=policy.names)
    engine.peer.call("free")
    engine.store(wanted, device="cuda", mode="auto")
    with Publisher(source, [engine], transport=transport, timeout_s=60, **WAYS[way]) as publisher:  # type: ignore[arg-type]
        start = time.perf_counter()
        publisher.connect()
        connect_s = time.perf_counter() - start
        reports = reports_of(publisher, policy.step, rounds, prepared=way == PREPARED)
        if name == "0.6B":
            check(engine, policy, name)
    label = f"{name} {str(policy.values[0].dtype)[6:]} {transport} {way}"
    report_rows(table, label, reports, connect_s, plain_ms)


def report_rows(table: Table, label: str, reports: list[Report], connect_s: float, plain_ms: float) -> None:
    (total, phases, worker), nbytes = Medians.of(reports), reports[-1].nbytes
    best = min(r.total_s for r in reports) * 1e3
    note = f"x{total / plain_ms:.2f} of foreach; " if plain_ms else ""
    first = reports[0].engines[0].workers[0]
    place = f"{first.shadow_nbytes / 1e9:.1f} GB in {first.shadow}" if first.shadow_nbytes else "no shadow"
    table.add(
        f"publish() {label}", total, nbytes, f"{note}min {best:.2f}; {phases}; connect {connect_s:.2f} s; {place}"
    )
    table.add(
        "  copy and digest in the engine", worker, nbytes, f"x{worker / plain_ms:.2f} of foreach" if plain_ms else ""
    )


def plain_copy(table: Table, name: str) -> float:
    """torch._foreach_copy_ of the same tensors within one process."""
    policy = Policy(name, torch.bfloat16)
    copies = [torch.empty_like(value) for value in policy.values]
    values = [value.data for value in policy.values]
    milliseconds = gpu_ms(lambda: torch._foreach_copy_(copies, values), 5)
    table.add(f"{name}: torch._foreach_copy_ of {len(values)} tensors", milliseconds, sum(v.nbytes for v in values))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    table = Table("publish")
    engine = PeerEngine()
    for name in options.shapes:
        plain_ms = plain_copy(table, name)
        torch.cuda.empty_cache()
        policy = Policy(name, torch.bfloat16)
        runs = [(policy, way, "cuda_ipc", options.rounds) for way in WAYS if name != "MoE" or "place" in way]
        if name == "0.6B":
            runs += [
                (policy, "staged", "nccl", 2),
                (Policy(name, torch.float32), "in place", "cuda_ipc", options.rounds),
                (Policy(name, torch.float32), PREPARED, "cuda_ipc", options.rounds),
            ]
        for source, way, transport, rounds in runs:
            try:
                measure(table, engine, source, name, way, transport, rounds, plain_ms)
            except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                table.fail(f"{name} {transport} {way}", error)
                engine.__exit__()
                engine = PeerEngine()
        del policy, runs, source
        engine.peer.call("free")
        torch.cuda.empty_cache()
    engine.__exit__()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
