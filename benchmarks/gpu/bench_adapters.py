"""What does it cost to publish merged adapters? LoRA of rank 16 on all linear layers, on a GPU, over cuda_ipc in place.

"merged": Publisher(peft_model), which merges into memory of its own; "merged and taken back": merge_adapter(), publish(),
unmerge_adapter(), which writes into the trainer's weights twice and leaves them rounded. The base module alone is the floor.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from common import Medians, Table
from shapes import SHAPES, groups, layouts
from torch import nn

from weightcast import Publisher
from weightcast.report.model import Report
from weightcast.sources import ModuleSource, SourceLike
from weightcast.testing.peer_engine import PeerEngine

LINEAR = ["q", "k", "v", "o", "gate", "up", "down"]


def module_of(name: str) -> nn.Module:
    """Layers of a shape at the places that its tensors have."""
    root = nn.Module()
    for tensor, shape in (each for group in groups(SHAPES[name]) for each in group):
        *path, last = tensor.split(".")
        at = root
        for step in path:
            if step not in at._modules:
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        if len(shape) == 2:
            layer: nn.Module = nn.Linear(shape[1], shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
        else:
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(shape, device="cuda", dtype=torch.bfloat16))
        at.add_module(last, layer)
    return root


def plain_name(name: str) -> str:
    return name.removesuffix(".weight")


def bare_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights, in which merge_adapter() leaves merged ones, by their names in the engine."""
    return {
        plain_name(name.removeprefix("base_model.model.").replace(".base_layer", "")): value
        for name, value in model.named_parameters()
        if "lora_" not in name
    }


def taken_back(model: Any) -> Callable[[Publisher], Report]:
    def call(publisher: Publisher) -> Report:
        model.merge_adapter()
        report = publisher.publish()
        model.unmerge_adapter()
        return report

    return call


@torch.no_grad()
def learn(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.mul_(-1.01)


def measure(
    table: Table, label: str, publisher: Publisher, model: nn.Module, call: Callable[[Publisher], Report], rounds: int
) -> None:
    with publisher:
        reports, walls = [], []
        for _ in range(rounds + 2):
            learn(model)
            torch.cuda.synchronize()
            start = time.perf_counter()
            reports.append(call(publisher))
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1e3)
            assert reports[-1].digests_match
        _, phases, _ = Medians.of(reports[2:])
        note = f"{phases}; own memory {reports[-1].own_nbytes / 1e9:.1f} GB"
        table.add(label, statistics.median(walls[2:]), reports[-1].nbytes, note)


def measure_all(table: Table, name: str, rounds: int) -> None:
    base = module_of(name)
    with PeerEngine() as engine:

        def publisher(source: SourceLike, rename: Any = None) -> Publisher:
            engine.peer.call("free")
            engine.store(layouts(SHAPES[name])[2], device="cuda", mode="in_place")
            return Publisher(source, [engine], transport="cuda_ipc", rename=rename, timeout_s=60)

        measure(table, f"{name} base alone", publisher(base, plain_name), base, Publisher.publish, rounds)
        config = peft.LoraConfig(r=16, target_modules=LINEAR, init_lora_weights=False)
        model: Any = peft.get_peft_model(base, config)
        measure(table, f"{name} merged", publisher(model, plain_name), model, Publisher.publish, rounds)
        source = ModuleSource(model, names=bare_tensors(model))
        measure(table, f"{name} merged and taken back", publisher(source), model, taken_back(model), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = Table("adapters")
    for name in options.shapes:
        try:
            measure_all(table, name, options.rounds)
        except Exception as error:  # noqa: BLE001 - the other rows are still worth having
            table.fail(name, error)
        torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
