"""Exchange: swap the values of all landings between live storages and their shadow, where parameters may not move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightcast.layout import Placement
from weightcast.memory import Memory
from weightcast.plan import Copy, merge

SCRATCH_NBYTES = 16 * 2**20


class Exchange:
    """Compiled once for a pair of memories with the same layout; ``run()`` twice is nothing."""

    def __init__(self, live: Memory, shadow: Memory, placements: Sequence[Placement]) -> None:
        runs, rest = merge(_self_copy(placement) for placement in placements)
        self._pairs = [
            (
                live.storages[run.dst_storage][run.dst_offset : run.dst_offset + run.nbytes],
                shadow.storages[run.dst_storage][run.dst_offset : run.dst_offset + run.nbytes],
            )
            for run in runs
        ]
        self._strided = [
            tuple(
                memory.view(copy.dst_storage, copy.dst_dtype, copy.dst_offset, copy.sizes, copy.dst_strides)
                for memory in (live, shadow)
            )
            for copy in rest
        ]

    @torch.no_grad()
    def run(self) -> None:
        """Swap all values. On a GPU the work is queued on the current stream."""
        for live, shadow in self._pairs:
            for start in range(0, live.numel(), SCRATCH_NBYTES):
                a, b = live[start : start + SCRATCH_NBYTES], shadow[start : start + SCRATCH_NBYTES]
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        for live, shadow in self._strided:
            kept = live.clone()
            live.copy_(shadow)
            shadow.copy_(kept)


def _self_copy(placement: Placement) -> Copy:
    return Copy(
        region=placement.region,
        src_storage=placement.storage,
        src_dtype=placement.dtype,
        src_offset=placement.offset,
        src_strides=placement.strides,
        dst_storage=placement.storage,
        dst_dtype=placement.dtype,
        dst_offset=placement.offset,
        dst_strides=placement.strides,
    )
