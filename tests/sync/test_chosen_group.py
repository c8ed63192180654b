"""Publishers of a trainer with several ranks where no process group is given: the source tells, or is asked about."""

from __future__ import annotations

import os
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.support.ports import HeldPort
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from weightcast import Publisher
from weightcast.errors import InvalidInput
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks

NOBODY = "http://127.0.0.1:9"


def begin(rank: int, size: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 5)


def publish_by_default(rank: int, size: int, folder: str) -> list[str]:
    begin(rank, size, folder)
    mesh, whole = init_device_mesh("cpu", (size,)), linear(1)
    gathered = linear(1)
    fully_shard(gathered, reshard_after_forward=False)
    gathered(torch.randn(2, 6))  # no parameter is a DTensor now
    planar = init_device_mesh("cpu", (1, size), mesh_dim_names=("replicas", "shards"))
    sources: list[Any] = [
        DistributedDataParallel(linear(1)),
        torch.compile(DistributedDataParallel(linear(1))),
        gathered,
        {name: distribute_tensor(value.detach(), mesh, [Shard(0)]) for name, value in linear(1).named_parameters()},
        {
            name: distribute_tensor(value.detach(), planar["shards"], [Shard(0)])
            for name, value in linear(1).named_parameters()
        },
    ]
    versions = []
    for source in sources:
        engines: list[Any] = [NOBODY]
        if rank == 0:
            engines = [LocalEngine("e", [DictModel(linear(2).state_dict())])]
        with Publisher(source, engines, timeout_s=20) as publisher:
            report = publisher.publish()
        assert report.digests_match
        versions.append(report.version)
        if rank == 0:
            assert engines[0].models[0].holds(whole.state_dict())
            engines[0].stop()
    dist.destroy_process_group()
    return versions


def test_all_ranks_publish_what_is_sharded_or_replicated_over_all_of_them(tmp_path: Path) -> None:
    told = run_ranks(publish_by_default, 2, str(tmp_path))
    assert told[0] == told[1]


def ask(rank: int, size: int, folder: str) -> list[str]:
    """What the errors say; each way that they name is gone."""
    begin(rank, size, folder)
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    own = pairs[0] if rank < 2 else pairs[1]
    told = []
    cut = distribute_tensor(torch.randn(4, 6), DeviceMesh("cpu", [0, 1]), [Shard(0)])
    sources: list[Any] = [
        linear(1),
        linear(1).state_dict(),
        folder,
        DistributedDataParallel(linear(1), process_group=own),
        {"weight": cut},
    ]
    for source in sources:
        with pytest.raises(InvalidInput) as caught:
            Publisher(source, [NOBODY], timeout_s=5)
        assert caught.value.field == "process_group"
        told.append(str(caught.value))
    with pytest.raises(InvalidInput, match="'auto'"):
        Publisher(linear(1), process_group="world")  # type: ignore[arg-type]
    versions = []
    for group in (dist.group.WORLD, own, None):
        is_first = dist.get_rank(group) == 0 if group is not None else rank == 0
        if group is None and not is_first:
            continue
        engine = LocalEngine("e", [DictModel(linear(2).state_dict())])
        with Publisher(linear(1), [engine] if is_first else [], process_group=group, timeout_s=20) as publisher:
            versions.append(publisher.publish().version)
        assert engine.models[0].holds(linear(1).state_dict()) == is_first
        engine.stop()
    assert len(set(versions)) == 1
    dist.barrier()
    dist.destroy_process_group()
    return told


def test_what_does_not_tell_which_ranks_publish_it_is_asked_about(tmp_path: Path) -> None:
    for rank, (module, state, checkpoint, wrapped, cut) in enumerate(run_ranks(ask, 3, str(tmp_path))):
        for text in (module, state, checkpoint):
            assert "torch.distributed has 3 ranks, and the source does not tell which of them publish it" in text
            assert "process_group=torch.distributed.group.WORLD" in text
            assert "process_group=None" in text
        assert f"the source is of ranks {[2] if rank == 2 else [0, 1]}" in wrapped
        assert "the source is of ranks [0, 1]" in cut


def train(rank: int, size: int, folder: str, port: int) -> list[str]:
    """The README's callback in a Trainer of two processes, started as torchrun starts them."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    start = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    engines: list[Any] = [LocalEngine("e", [DictModel(start)])] if rank == 0 else [NOBODY]
    versions: list[str] = []

    class Publish(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.publisher = Publisher(model, engines, timeout_s=30)
            self.note()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.publisher.close()

        def note(self) -> None:
            versions.append(self.publisher.publish().version)
            assert rank or engines[0].models[0].holds(model.state_dict())

    data = [{"input_ids": (ids := torch.randint(0, 32, (8,))), "labels": ids} for _ in range(32)]
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Publish()]).train()
    if rank == 0:
        engines[0].stop()
    dist.barrier()
    dist.destroy_process_group()
    return versions


def test_the_readme_s_callback_publishes_from_a_trainer_of_two_processes(tmp_path: Path) -> None:
    with closing(HeldPort()) as held:
        told = run_ranks(train, 2, str(tmp_path), held.number, timeout_s=110)
    assert told[0] == told[1]
    assert len(set(told[0])) == 4
