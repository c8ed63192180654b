"""Replay on a GPU: all runs of a plan in one kernel launch, whatever their number; casts and strided boxes as batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightcast.cuda.runs import CopyRuns
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, merge
from weightcast.plan.replay import Boxes


class CudaReplay:
    """The copies between two memories of one GPU (or memory that this GPU can reach), compiled once.

    It keeps both memories alive. ``run()`` queues everything on the current stream of the destination's GPU.
    """

    def __init__(self, copies: Sequence[Copy], src: Memory, dst: Memory, device: torch.device) -> None:
        runs, rest = merge(copies, across_padding=src.is_arena and dst.is_arena)
        self._memories = (src, dst)
        self.nbytes = sum(copy.nbytes for copy in copies)
        addresses = [
            (
                src.storages[run.src_storage].data_ptr() + run.src_offset,
                dst.storages[run.dst_storage].data_ptr() + run.dst_offset,
                run.nbytes,
            )
            for run in runs
        ]
        self._runs = CopyRuns(addresses, device)
        self._boxes = Boxes(rest, src, dst)

    def warm_up(self) -> None:
        """Compile and load the kernel of ``run``; nothing is copied."""
        self._runs.warm_up()

    @torch.no_grad()
    def run(self) -> int:
        """Queue all copies; returns the bytes that will have been written."""
        self._runs.run()
        self._boxes.run()
        return self.nbytes
