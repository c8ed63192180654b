"""nixl on one GPU: the suite from GPU to GPU, from host memory to a GPU and back, and publish() end to end."""

from __future__ import annotations

import os

import pytest
import torch
from gpu_sides import GpuWorkerSide
from gpu_suite import GpuSidesSuite

from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import bulk_case

pytest.importorskip("triton", reason="needs a CUDA build of torch")
pytest.importorskip("nixl_cu13", reason="needs NIXL: pip install 'weightcast[nixl]'")

NIXL = "weightcast.transports.nixl:NixlTransport"
NBYTES = 256 * 2**20


class NixlSuite(GpuSidesSuite):
    transport = NIXL
    meets = True


class TestGpuToGpu(NixlSuite):
    device = "cuda"


class TestHostToGpu(NixlSuite):
    worker_device = "cuda"


class TestGpuToHost(NixlSuite):
    device = "cuda"
    worker_device = "cpu"


@pytest.mark.parametrize(("source", "target"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_values_of_an_optimizer_step_that_is_still_queued_arrive(source: str, target: str) -> None:
    """``send`` waits for the trainer's GPU. Looked at element by element, on the device where they landed."""
    case = bulk_case(NBYTES)
    with Peer(GpuWorkerSide) as worker:
        from weightcast.transports.nixl import NixlTransport

        transport = NixlTransport()
        values = torch.zeros(NBYTES, dtype=torch.uint8, device=source)
        memory = transport.adopt(Memory([values]))
        end = transport.trainer_end(case.copies, memory)
        try:
            worker.call("open", NIXL, target, end.offer(), case.copies)
            worker.call("make", 0, case.dst_nbytes)
            worker.start("connect")
            end.connect(Deadline(60))
            worker.result()
            for _ in range(3):
                fresh = os.urandom(NBYTES)
                staged = torch.frombuffer(bytearray(fresh), dtype=torch.uint8).to(source)
                if source == "cuda":
                    torch.cuda._sleep(200_000_000)
                values.copy_(staged)
                end.send(Deadline(60))
                assert worker.call("receive", 0, 60.0) == NBYTES
                assert worker.call("read") == [fresh]
        finally:
            end.close()
            transport.release(memory)
