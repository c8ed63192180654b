"""Replay: a plan compiled to pairs of tensor views once, then copied as often as there are rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import dtype_of
from weightcast.plan import Copy, Run, merge, slices

CPU_BLOCK_NBYTES = 2**20
"""Values that are cast twice on a CPU are so many bytes at a time: what is between the casts stays in the cache."""
GPU_BLOCK_NBYTES = 2**26
"""The same on a GPU, where each block is two launches."""


class Boxes:
    """Copies that are no runs, compiled to batches of view pairs: strided boxes and casts. It keeps both memories alive.

    Values that are cast twice, through the published type, go in blocks, so that the memory between the casts is bounded.
    """

    def __init__(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> None:
        self._direct = _views([copy for copy in copies if not copy.via], src, dst)
        on_gpu = any(storage.is_cuda for storage in src.storages)
        self._through = [
            (dtype_of(via), *_views(block, src, dst))
            for via in sorted({copy.via for copy in copies if copy.via})
            for block in slices(
                (copy for copy in copies if copy.via == via), GPU_BLOCK_NBYTES if on_gpu else CPU_BLOCK_NBYTES
            )
        ]

    def __len__(self) -> int:
        """View pairs."""
        return len(self._direct[0]) + sum(len(targets) for _, targets, _ in self._through)

    @torch.no_grad()
    def run(self) -> None:
        """Copy everything. On a GPU the work is queued on the current stream."""
        targets, values = self._direct
        if targets:
            torch._foreach_copy_(targets, values)
        for via, targets, values in self._through:
            published = [torch.empty_like(value, dtype=via) for value in values]
            torch._foreach_copy_(published, values)
            torch._foreach_copy_(targets, published)


def _views(copies: Sequence[Copy], src: Memory, dst: Memory) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Destinations and sources of the copies, in their order."""
    return (
        [dst.view(c.dst_storage, c.dst_dtype, c.dst_offset, c.sizes, c.dst_strides) for c in copies],
        [src.view(c.src_storage, c.src_dtype, c.src_offset, c.sizes, c.src_strides) for c in copies],
    )


class Replay:
    """The copies between two memories as few, large view pairs. ``run()`` does them all; it needs no names.

    Between two arenas the zeros of a gap are copied with the values around it, which leaves one pair for a whole model.
    """

    def __init__(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> None:
        runs, rest = merge(copies, across_padding=src.is_arena and dst.is_arena)
        self.nbytes = sum(copy.nbytes for copy in copies)
        self._dst = [self._bytes(dst, run.dst_storage, run.dst_offset, run) for run in runs]
        self._src = [self._bytes(src, run.src_storage, run.src_offset, run) for run in runs]
        self._boxes = Boxes(rest, src, dst)

    @staticmethod
    def _bytes(memory: Memory, storage: int, offset: int, run: Run) -> torch.Tensor:
        return memory.storages[storage][offset : offset + run.nbytes]

    def __len__(self) -> int:
        return len(self._dst) + len(self._boxes)

    @torch.no_grad()
    def run(self) -> int:
        """Copy everything; returns the bytes written. On a GPU the work is queued on the current stream."""
        if self._dst:
            torch._foreach_copy_(self._dst, self._src)
        self._boxes.run()
        return self.nbytes
