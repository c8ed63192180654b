"""Adapters of modules that several ranks hold by shards: merged as one process would merge them, published from where the shards lie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_adapters import base, learn, lora, scatter
from tiny_modules import saved
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from weightcast import Publisher
from weightcast.errors import StateError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks


def by_layers(model: Any, rows: bool = True) -> Any:
    """FSDP2 as most use it, along dimension 0, or along the last one."""

    def place(parameter: nn.Parameter) -> Shard | None:
        return None if rows or parameter.dim() < 2 else Shard(parameter.dim() - 1)

    for layer in model.get_base_model().model.layers:
        fully_shard(layer, shard_placement_fn=place if not rows else None)
    return fully_shard(model)


def by_columns(model: Any) -> Any:
    return by_layers(model, rows=False)


def replicated(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


SHARDED: dict[str, tuple[str, Callable[[], LoraConfig], Callable[[Any], Any]]] = {
    "lora": ("qwen3", lambda: lora(modules_to_save=["lm_head"]), by_layers),
    "dora": ("qwen3", lambda: lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]), by_columns),
    "tied": ("qwen3_tied", lambda: lora(target_modules=["embed_tokens", "up_proj"]), by_layers),
    "replicas": ("qwen3", lambda: lora(use_rslora=True), replicated),
    "experts": (
        "qwen3_moe",
        lambda: lora(target_modules=["o_proj"], target_parameters=["mlp.experts.down_proj"]),
        by_layers,
    ),
}


@torch.no_grad()
def gather_into(whole: nn.Module, model: nn.Module) -> None:
    for (name, value), (other, shard) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert name == other.removeprefix("module.")
        value.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)


def publish_adapted_shards(rank: int, size: int, folder: str, kinds: list[str]) -> list[str]:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    told = []
    for number, kind in enumerate(kinds):
        arch, config, shard = SHARDED[kind]
        torch.manual_seed(number)
        model = get_peft_model(base(arch), config())
        scatter(model)
        whole = copy.deepcopy(model)
        model = shard(model)
        optimizer = torch.optim.AdamW((v for v in model.parameters() if v.requires_grad), lr=0.05)
        engines = []
        if rank == 0:
            start = saved(copy.deepcopy(whole).merge_and_unload(), Path(folder, "start"))
            engines = [LocalEngine("e", [DictModel(start, rows=(worker, 2)) for worker in range(2)])]
        try:
            transport = "tcp" if number % 2 else "shm"
            with Publisher(model, engines, transport=transport, timeout_s=30) as publisher:
                for waits in (True, True, False):
                    learn(model, optimizer)
                    with torch.no_grad():  # FSDP leaves gathered tensors in the place of some shards
                        model(input_ids=torch.randint(64, (1, 4)))
                    flags = [value.requires_grad for value in model.parameters()]
                    report = publisher.publish() if waits else publisher.publish(wait=False).wait()
                    assert flags == [value.requires_grad for value in model.parameters()]
                    assert report.digests_match
                    told.append(report.version)
                    gather_into(whole, model)
                    if rank == 0:
                        truth = saved(copy.deepcopy(whole).merge_and_unload(), Path(folder, "truth"))
                        assert all(worker.holds(truth) for worker in engines[0].models), kind
                if kind == "lora":
                    told.append(refuse_other_adapters(rank, model, publisher))
        finally:
            for engine in engines:
                engine.stop()
    dist.destroy_process_group()
    return told


def refuse_other_adapters(rank: int, model: Any, publisher: Publisher) -> str:
    """One rank's adapters are scaled differently: all ranks are told, none waits for the other."""
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.set_scale("default", 1.0 + rank)
    with pytest.raises(StateError, match="adapters of this rank are not those of the other ranks"):
        publisher.publish()
    layer.set_scale("default", 1.0)
    return publisher.publish().version


@pytest.mark.parametrize(("size", "kinds"), [(2, ["lora", "dora", "tied", "experts", "replicas"]), (3, ["lora"])])
def test_sharded_adapters_are_merged_as_one_process_merges_them(tmp_path: Path, size: int, kinds: list[str]) -> None:
    told = run_ranks(publish_adapted_shards, size, str(tmp_path), kinds, timeout_s=110)
    assert len(set(told[0])) >= 3 * len(kinds)
    assert all(versions == told[0] for versions in told)
