"""Weights that are somewhere else in each round: offloaded and brought back, replaced, with or without expandable segments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from card import in_use, until_in_use_is_below
from torch import nn

from weightcast import Publisher
from weightcast.testing.peer_engine import PeerEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")

SETTING = "PYTORCH_CUDA_ALLOC_CONF"
IS_EXPANDABLE = "expandable_segments:True" in os.environ.get(SETTING, "")
SHAPES = {
    "embed": ((5000, 513), "bfloat16"),
    "wide": ((3000, 4096), "bfloat16"),
    "deep": ((2000, 1024), "float32"),
    "norm": ((64,), "float32"),
}


def policy(device: str) -> nn.ParameterDict:
    return nn.ParameterDict(
        {
            name: nn.Parameter(torch.randn(shape, device=device).to(getattr(torch, dtype)))
            for name, (shape, dtype) in SHAPES.items()
        }
    )


@torch.no_grad()
def step(module: nn.Module) -> None:
    for value in module.parameters():
        value.copy_(torch.randn(value.shape))


def contents(module: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, value in module.named_parameters()
    }


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


def offload(module: nn.Module) -> None:
    """To the host and back, with other memory in between, so that nothing lies where it lay."""
    module.cpu()
    torch.cuda.empty_cache()
    kept = torch.empty(2**20, device="cuda")
    module.cuda()
    del kept


def replace_data(module: nn.Module) -> None:
    for value in module.parameters():
        value.data = value.data.clone()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
@pytest.mark.parametrize("move", [offload, replace_data])
def test_a_module_that_moves_every_step(engine: PeerEngine, transport: str, mode: str, move: object) -> None:
    engine.build(SHAPES, device="cuda", mode=mode)
    module = policy("cuda")
    with Publisher(module, [engine], transport=transport, timeout_s=60) as publisher:
        for number in range(1, 6):
            step(module)
            if number != 3:  # in one round they lie still
                move(module)  # type: ignore[operator]
            report = publisher.publish()
            assert (report.number, report.digests_match) == (number, True)
            assert engine.peer.call("contents") == contents(module)


def test_a_module_is_published_from_wherever_it_is(engine: PeerEngine) -> None:
    engine.build(SHAPES, device="cuda", mode="staged")
    module = policy("cuda")
    with Publisher(module, [engine], timeout_s=60) as publisher:
        for device, transport in (("cuda", "cuda_ipc"), ("cpu", "shm_cuda"), ("cuda", "cuda_ipc"), ("cpu", "shm_cuda")):
            module.to(device)
            step(module)
            report = publisher.publish()
            assert report.engines[0].workers[0].transport == transport
            assert engine.peer.call("contents") == contents(module)


HELD_NBYTES = 2 * 2**30


def test_what_is_offloaded_between_rounds_is_free() -> None:
    """As the GPU says itself, whichever process had the memory mapped.

    One mode after the other, in one test: other tests take less of the card beside this one.
    """
    shapes = {f"w{i}": ((2**13, 2**14), "bfloat16") for i in range(8)}
    for mode in ("staged", "in_place"):
        module = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="cuda"))
                for name, (shape, _) in shapes.items()
            }
        )
        with (
            PeerEngine() as engine,
            Publisher(module, [engine], transport="cuda_ipc", hold="round", timeout_s=100) as publisher,
        ):
            engine.build(shapes, device="cuda", mode=mode)
            for _ in range(2):
                module.cuda()
                with torch.no_grad():
                    for value in module.parameters():
                        value.normal_()
                assert publisher.publish().digests_match
                torch.cuda.synchronize()
                before = in_use()
                module.cpu()
                until_in_use_is_below(before - HELD_NBYTES // 2)
            live = engine.peer.call("contents", timeout_s=60)
            assert live["w3"] == contents(module)["w3"]
        torch.cuda.empty_cache()


@pytest.mark.skipif(IS_EXPANDABLE, reason="this is it")
def test_all_of_that_with_expandable_segments(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-c", str(pytestconfig.inipath), "--rootdir", str(pytestconfig.rootpath), "--tb=short"]
    command += [__file__, "-k", "cuda_ipc or wherever or free"]
    done = subprocess.run(
        command, env=os.environ | {SETTING: "expandable_segments:True"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
