"""publish(wait=False) on a GPU: engines get the values of the moment of the call, though the next kernels write over them at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.testing.peer_engine import PeerEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")

SHAPES = {
    "embed": ((5000, 513), "bfloat16"),
    "wide": ((3000, 4096), "bfloat16"),
    "deep": ((2000, 1024), "float32"),
    "norm": ((64,), "float32"),
}


def policy() -> nn.ParameterDict:
    return nn.ParameterDict(
        {
            name: nn.Parameter(torch.randn(shape, device="cuda").to(getattr(torch, dtype)))
            for name, (shape, dtype) in SHAPES.items()
        }
    )


@torch.no_grad()
def step(module: nn.Module) -> None:
    """Queued, and not waited for."""
    for value in module.parameters():
        value.normal_()


def contents(module: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, value in module.named_parameters()
    }


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize(("transport", "on_host"), [("cuda_ipc", False), ("nccl", False), ("shm_cuda", True)])
def test_a_snapshot_is_served_while_the_weights_change(
    engine: PeerEngine, transport: str, on_host: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.build(SHAPES, device="cuda", mode=mode)
    module = policy()
    if on_host:  # as where the GPU has no room
        monkeypatch.setattr("weightcast.sources.snapshot.GPU_SHARE_LEFT", 1)
    with Publisher(module, [engine], transport=transport, timeout_s=60) as publisher:  # type: ignore[arg-type]
        for number in range(1, 5):
            step(module)
            truth = contents(module)
            publishing = publisher.publish(wait=False)
            for _ in range(5):
                step(module)
            report = publishing.wait()
            assert (report.number, report.digests_match) == (number, True)
            assert report.held_s == publishing.held_s
            assert report.engines[0].workers[0].transport == transport
            assert engine.peer.call("contents") == truth
            assert contents(module) != truth


def test_a_snapshot_is_freed_with_the_publisher_and_made_once(engine: PeerEngine) -> None:
    engine.build(SHAPES, device="cuda", mode="staged")
    module = policy()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with Publisher(module, [engine], transport="cuda_ipc", timeout_s=60) as publisher:
        taken = set()
        for _ in range(4):
            step(module)
            report = publisher.publish(wait=False).wait()
            taken.add(report.own_nbytes)
        assert len(taken) == 1
        nbytes = taken.pop()
        assert before + nbytes <= torch.cuda.memory_allocated() <= before + nbytes + 2**26
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**22
