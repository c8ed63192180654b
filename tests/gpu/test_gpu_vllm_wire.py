"""vLLM's native nccl wire, both ends of ours: every dtype arrives exactly, and nobody waits for the dead."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from native_server import NativeServer

from weightcast.errors import DeadlineExceeded, PeerLost, StateError, TransportError, WeightcastError
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of
from weightcast.testing.ranks import Peer
from weightcast.vllm_protocol.nccl.trainer import VllmNativePublisher


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer(NativeServer) as peer:
        yield peer


def random_tensors() -> dict[str, torch.Tensor]:
    rng, tensors = random.Random(random.SystemRandom().getrandbits(32)), {}
    names = [f"{dtype}.{i}" for dtype in DTYPE_NAMES for i in range(4)]
    rng.shuffle(names)
    for name in names:
        dtype = dtype_of(name.partition(".")[0])
        shape = rng.choice([(), (0, 3), (rng.randint(1, 9),), (rng.randint(1, 70), rng.randint(1, 300))])
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8)
        tensors[name] = data.cuda().view(dtype).view(shape)
    return tensors


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("version", "buffer_nbytes"), [("0.26.0", 2**30), ("0.28.1", 5000), ("0.33.0", 20_000)])
def test_every_dtype_arrives_whatever_the_dialect(server: Peer, version: str, buffer_nbytes: int) -> None:
    tensors = random_tensors()
    port = server.call("listen", version, 30.0)
    with VllmNativePublisher(
        tensors, f"http://127.0.0.1:{port}", timeout_s=30.0, buffer_nbytes=buffer_nbytes
    ) as publisher:
        publisher.connect()
        for number in range(2):
            report = publisher.publish(f"v{number}")
            assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values())
            assert server.call("contents") == contents(tensors)
            assert server.call("state")[1:] == ([], f"v{number}", False)
            for tensor in tensors.values():
                if tensor.dtype == torch.float32 and tensor.numel():
                    tensor.copy_(torch.randn(tensor.shape))
        calls = server.call("state")[0]
    assert calls[1:7] == [
        "/pause?mode=keep",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ]


def test_a_server_killed_in_the_middle_is_named_within_the_deadline(server: Peer) -> None:
    tensors = {f"w{i}": torch.randn(2**24, device="cuda") for i in range(16)}
    port = server.call("listen", "0.33.0", 20.0)
    with VllmNativePublisher(tensors, f"http://127.0.0.1:{port}", timeout_s=20.0, buffer_nbytes=2**26) as publisher:
        publisher.connect()
        publisher.publish()
        server.freeze()
        killer = threading.Timer(0.5, os.kill, (server.pid, signal.SIGKILL))
        killer.start()
        start = time.monotonic()
        with pytest.raises((PeerLost, TransportError, DeadlineExceeded)):
            publisher.publish()
        assert time.monotonic() - start < 5.0
        killer.join()
        with pytest.raises(StateError):
            publisher.publish()
    assert float((torch.ones(8, device="cuda") * 2).sum()) == 16.0


class NativeTrainer:
    """The trainer in a process of its own, to be killed."""

    def __init__(self) -> None:
        os.environ["NCCL_HOSTID"] = f"test-{os.getpid()}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"

    def connect(self, port: int) -> None:
        self.tensors = {f"w{i}": torch.randn(2**26, device="cuda") for i in range(16)}
        url = f"http://127.0.0.1:{port}"
        self.publisher = VllmNativePublisher(self.tensors, url, timeout_s=30.0, buffer_nbytes=2**27)
        self.publisher.connect()

    def publish(self) -> int:
        return self.publisher.publish("after").nbytes


def test_a_trainer_killed_in_the_middle_leaves_the_engine_dirty_until_the_next(server: Peer) -> None:
    port = server.call("listen", "0.33.0", 4.0)
    with Peer(NativeTrainer, rank=0) as trainer:
        trainer.call("connect", port)
        trainer.start("publish")
        time.sleep(0.3)
        trainer.kill()
    deadline = time.monotonic() + 8.0
    while not server.call("state")[1] and time.monotonic() < deadline:
        time.sleep(0.1)
    _, errors, version, dirty = server.call("state")
    assert errors
    assert set(errors) <= {"PeerLost", "TransportError", "DeadlineExceeded"}
    assert (version, dirty) == ("default", True)
    with Peer(NativeTrainer, rank=0) as trainer:
        trainer.call("connect", port)
        trainer.call("publish")
    assert server.call("state")[2:] == ("after", False)


def test_nobody_there_is_named(server: Peer) -> None:
    with (
        VllmNativePublisher({"w": torch.ones(3, device="cuda")}, "http://127.0.0.1:9", timeout_s=3.0) as publisher,
        pytest.raises(WeightcastError),
    ):
        publisher.connect()
