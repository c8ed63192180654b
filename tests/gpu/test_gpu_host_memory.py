"""Host memory to a GPU and back: shm_cuda and tcp, the suite and publish() end to end, with whatever transport "auto" takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from gpu_suite import GpuSidesSuite
from torch import nn

from weightcast import Publisher, StreamSource
from weightcast.testing.peer_engine import PeerEngine
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import bulk_case

pytest.importorskip("triton", reason="needs a CUDA build of torch")

SHAPES = {
    "embed": ((5000, 513), "bfloat16"),
    "wide": ((300, 4096), "bfloat16"),
    "deep": ((2000, 1024), "float32"),
    "scale": ((7,), "bfloat16"),
    "eight": ((33, 65), "float8_e4m3fn"),
    "norm": ((64,), "float32"),
    "steps": ((), "int64"),
}
Tensors = dict[str, torch.Tensor]


class TestShmCuda(GpuSidesSuite):
    transport = "weightcast.transports.shm_cuda:ShmCudaTransport"
    worker_device = "cuda"
    bucket_sizes = (8192,)

    @pytest.mark.parametrize("trainer_is_killed", [False, True])
    def test_nothing_stays_mapped_after_close(self, trainer: Peer, worker: Peer, trainer_is_killed: bool) -> None:
        case = bulk_case(64 * 2**20)
        offer = trainer.call("open", self.transport, "cpu", case.copies, case.src_nbytes, 2**20)
        worker.call("open", self.transport, "cuda", offer, case.copies)
        worker.call("make", 0, case.dst_nbytes)
        worker.call("connect")
        assert worker.call("mapped_arenas") == 1
        values = os.urandom(64 * 2**20)
        trainer.call("write", [values])
        worker.call("receive")
        assert worker.call("read") == [values]
        if trainer_is_killed:
            trainer.kill()
        worker.call("close")
        assert worker.call("mapped_arenas") == 0
        assert worker.call("multiply", 5) < 1e-9


class TestTcpToGpu(GpuSidesSuite):
    transport = "tcp"
    worker_device = "cuda"


class TestTcpFromGpu(GpuSidesSuite):
    transport = "tcp"
    device = "cuda"
    worker_device = "cpu"


def fresh(device: str) -> Tensors:
    return {
        name: torch.randn(shape).mul(9).to(device=device, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in SHAPES.items()
    }


def contents(values: Tensors) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        for name, value in values.items()
    }


class Policy(nn.Module):
    """Parameters and buffers of the shapes, new values by ``step``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        for name, value in fresh(device).items():
            if value.is_floating_point() and value.element_size() > 1:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @torch.no_grad()
    def step(self) -> None:
        for value in self.state_dict().values():
            value.copy_(torch.randn(value.shape).mul(9))


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


@pytest.mark.parametrize(
    ("source", "target", "transport"), [("cpu", "cuda", "shm_cuda"), ("cpu", "cuda", "tcp"), ("cuda", "cpu", "tcp")]
)
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_module_is_published_to_the_other_kind_of_memory(
    engine: PeerEngine, source: str, target: str, transport: str, mode: str
) -> None:
    engine.build(SHAPES, device=target, mode=mode)
    policy = Policy(source)
    wanted = transport if transport == "tcp" and target == "cuda" else "auto"
    with Publisher(policy, [engine], transport=wanted, timeout_s=60) as publisher:
        for _ in range(3):
            policy.step()
            report = publisher.publish()
            assert report.digests_match
            assert report.engines[0].workers[0].transport == transport
            assert engine.peer.call("contents") == contents(policy.state_dict())


def test_masters_in_host_memory_are_cast_on_their_way(engine: PeerEngine) -> None:
    """float32 in the host's memory, published as bfloat16 to an engine in bfloat16: the GPU casts what it reads over the bus."""
    shapes = {name: (shape, "bfloat16") for name, (shape, dtype) in SHAPES.items() if dtype in ("bfloat16", "float32")}
    engine.build(shapes, device="cuda", mode="staged")
    masters = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, (shape, _) in shapes.items()})
    with Publisher(masters, [engine], dtype=torch.bfloat16, timeout_s=60) as publisher:
        for _ in range(2):
            for value in masters.values():
                value.data.copy_(torch.randn(value.shape))
            report = publisher.publish()
            assert report.digests_match
            assert report.engines[0].workers[0].transport == "shm_cuda"
            rounded = {name: value.detach().to(torch.bfloat16) for name, value in masters.items()}
            assert engine.peer.call("contents") == contents(rounded)


def test_a_stream_through_windows_in_host_memory_reaches_a_gpu(engine: PeerEngine) -> None:
    engine.build(SHAPES, device="cuda", mode="staged")
    values = fresh("cpu")
    source = StreamSource(lambda: values.items(), window_nbytes=4 * 2**20, device="cpu")
    with Publisher(source, [engine], timeout_s=60) as publisher:
        for _ in range(3):
            values = fresh("cpu")
            report = publisher.publish()
            assert report.engines[0].workers[0].transport == "shm_cuda"
            assert engine.peer.call("contents") == contents(values)


@pytest.mark.parametrize("opens_files", [True, False])
def test_a_checkpoint_is_pushed_to_a_gpu_without_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens_files: bool
) -> None:
    """The worker reads the files where its operator lets it, and gets their bytes over tcp otherwise."""
    if opens_files:
        monkeypatch.setenv("WEIGHTCAST_CHECKPOINT_ROOT", str(tmp_path))
    else:
        monkeypatch.delenv("WEIGHTCAST_CHECKPOINT_ROOT", raising=False)
    values = fresh("cpu")
    safetensors.torch.save_file(values, tmp_path / "model.safetensors")
    with PeerEngine() as engine:
        engine.build(SHAPES, device="cuda", mode="staged")
        with contextlib.closing(Publisher(tmp_path, [engine], timeout_s=60)) as publisher:
            report = publisher.publish()
            assert report.digests_match
            assert report.engines[0].workers[0].transport == ("shm_cuda" if opens_files else "tcp")
            assert engine.peer.call("contents") == contents(values)
