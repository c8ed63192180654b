"""One adapter of a model that several ranks hold by shards, published by itself: whole matrices arrive, and ranks agree in its scaling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_adapters_sharded import by_columns, by_layers
from tiny_adapters import base, learn
from torch.distributed.tensor import DTensor

from weightcast import Publisher
from weightcast.engines.embedded import LLM
from weightcast.errors import StateError
from weightcast.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def publish_shards(rank: int, size: int, folder: str) -> list[str]:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    told = []
    for number, (shard, r) in enumerate(((by_layers, 5), (by_columns, 4))):
        torch.manual_seed(number)
        plain = base("qwen3")
        engines = [LLM(copy.deepcopy(plain), num_threads=1)] if rank == 0 else []
        config = LoraConfig(
            r=r, lora_alpha=7, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
        )
        model = shard(get_peft_model(plain, config, adapter_name="policy"))
        optimizer = torch.optim.AdamW((v for v in model.parameters() if v.requires_grad), lr=0.05)
        transport = "tcp" if number else "shm"
        with Publisher(model, engines, adapter="policy", transport=transport, timeout_s=30) as publisher:
            for _ in range(3):
                learn(model, optimizer)
                told.append(publisher.publish().version)
                truth = {name: whole(value) for name, value in model.named_parameters() if "lora_" in name}
                for engine in engines:
                    modules = engine.engine.core.adapters.find("policy").modules
                    held = {f"{m}.lora_{f}": v for m, (a, b, _) in modules.items() for f, v in (("A", a), ("B", b))}
                    assert len(held) == len(truth)
                    for name, value in truth.items():
                        plain_name = name.partition("base_model.model.")[2].removesuffix(".policy.weight")
                        assert torch.equal(held[plain_name], value), name
            layer = model.get_base_model().model.layers[0].self_attn.q_proj
            layer.set_scale("policy", 1.0 + rank)
            with pytest.raises(StateError, match="adapters of this rank are not those of the other ranks"):
                publisher.publish()
            layer.set_scale("policy", 3.0)
            told.append(publisher.publish().version)
            for engine in engines:
                version = engine.engine.core.adapters.find("policy")
                assert version.modules["model.layers.0.self_attn.q_proj"][2] == pytest.approx(3 * 7 / r)
                assert version.modules["model.layers.1.self_attn.q_proj"][2] == pytest.approx(7 / r)
            if rank == 1:
                layer.delete_adapter("policy")
            with pytest.raises(StateError, match=r"is gone from '.*q_proj'|are not those of the other ranks"):
                publisher.publish()
        for engine in engines:
            engine.shutdown()
    dist.destroy_process_group()
    return told


def test_shards_of_an_adapter(tmp_path: Path) -> None:
    told = run_ranks(publish_shards, 2, str(tmp_path), timeout_s=110)
    assert told[0] == told[1]
    assert len(set(told[0])) == 8
