"""Sides of a pair that live in processes of their own and share one GPU."""

from __future__ import annotations

import os

import torch

from weightcast.testing.transport_sides import TrainerSide, WorkerSide


def _be_a_host_of_its_own() -> None:
    os.environ["NCCL_HOSTID"] = f"test-{os.getpid()}"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"


class GpuTrainerSide(TrainerSide):
    def __init__(self) -> None:
        _be_a_host_of_its_own()
        super().__init__()


class GpuWorkerSide(WorkerSide):
    def __init__(self) -> None:
        _be_a_host_of_its_own()
        super().__init__()

    def multiply(self, seed: int) -> float:
        """Something that needs a GPU in order: the error of a matrix product against the CPU's."""
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        return float((a.cuda() @ b.cuda()).cpu().sub(a @ b).abs().max())
