"""Sides of a pair that live in processes of their own and share one GPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from weightcast.cuda import driver
from weightcast.errors import TransportError
from weightcast.testing.transport_sides import TrainerSide, WorkerSide


def _be_a_host_of_its_own() -> None:
    os.environ["NCCL_HOSTID"] = f"test-{os.getpid()}"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"


class GpuTrainerSide(TrainerSide):
    def __init__(self) -> None:
        _be_a_host_of_its_own()
        super().__init__()

    def let_go(self) -> tuple[int, int]:
        """Close and forget everything; how many bytes of the GPU torch keeps for this process before and after."""
        before = torch.cuda.memory_reserved()
        self.close()
        del self.end  # it keeps the memory alive that it exported
        gc.collect()
        torch.cuda.empty_cache()
        return before, torch.cuda.memory_reserved()


class GpuWorkerSide(WorkerSide):
    """An engine's worker, which uses its GPU long before it meets a trainer: starting CUDA knows no deadline."""

    def __init__(self) -> None:
        _be_a_host_of_its_own()
        torch.zeros(1, device="cuda")
        super().__init__()

    def mapped(self) -> list[int]:
        """Where the trainer's allocations are mapped in this process; of a pair over cuda_ipc."""
        return list(self.end._pull._reached._opened)  # type: ignore[attr-defined]

    def allocation_nbytes(self, address: int) -> int:
        """How large the GPU allocation is that starts at an address of this process; 0 where there is none."""
        try:
            start, nbytes = driver.allocation_of(address, torch.device("cuda", 0))
        except TransportError:
            return 0
        return nbytes if start == address else 0

    def mapped_arenas(self) -> int:
        """How many mappings this process has of shared arenas of weights."""
        return sum("memfd:weightcast" in line for line in Path("/proc/self/maps").read_text().splitlines())

    def multiply(self, seed: int) -> float:
        """Something that needs a GPU in order: the error of a matrix product against the CPU's."""
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        return float((a.cuda() @ b.cuda()).cpu().sub(a @ b).abs().max())
