"""Modules with adapters of PEFT on a GPU: merged weights are published as merge_and_unload() makes them of a copy there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.testing.peer_engine import PeerEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 256)
        self.q, self.down = nn.Linear(256, 768), nn.Linear(768, 256, bias=False)
        self.norm = nn.LayerNorm(256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.down(self.q(self.embed(tokens)).relu()))
        return found


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "modules_to_save": ["norm"]},
}


def merged(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, value in tensors.items()
    }


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_merged_on_the_gpu_as_peft_merges_them(engine: PeerEngine, kind: str, dtype: torch.dtype) -> None:
    config = peft.LoraConfig(r=8, target_modules=["embed", "q", "down"], init_lora_weights=False, **KINDS[kind])
    model = peft.get_peft_model(Block().to("cuda", dtype), config)
    optimizer = torch.optim.SGD((value for value in model.parameters() if value.requires_grad), lr=0.1)
    truth = merged(model)
    engine.build({name: (tuple(v.shape), str(v.dtype)[6:]) for name, v in truth.items()}, device="cuda")
    with Publisher(model, [engine], transport="cuda_ipc", timeout_s=60) as publisher:
        for number in range(4):
            model(torch.randint(512, (4, 16), device="cuda")).square().mean().backward()
            optimizer.step()
            truth = merged(model)
            before = [(id(v), v.data_ptr(), v._version, v.requires_grad) for v in model.parameters()]
            waits = number < 2
            report = publisher.publish() if waits else publisher.publish(wait=False).wait()
            assert before == [(id(v), v.data_ptr(), v._version, v.requires_grad) for v in model.parameters()]
            assert report.digests_match
            assert engine.peer.call("contents") == contents(truth)
