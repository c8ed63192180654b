"""Replay: a plan compiled to pairs of tensor views once, then copied as often as there are rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weightcast.memory import Memory
from weightcast.plan import Copy, Run, merge


class Replay:
    """The copies between two memories as few, large view pairs. ``run()`` does them all; it needs no names.

    Between two arenas the zeros of a gap are copied with the values around it, which leaves one pair for a whole model.
    """

    def __init__(self, copies: Sequence[Copy], src: Memory, dst: Memory) -> None:
        runs, rest = merge(copies, across_padding=src.is_arena and dst.is_arena)
        self.nbytes = sum(copy.nbytes for copy in copies)
        self._dst = [self._bytes(dst, run.dst_storage, run.dst_offset, run) for run in runs]
        self._src = [self._bytes(src, run.src_storage, run.src_offset, run) for run in runs]
        for copy in rest:
            self._dst.append(dst.view(copy.dst_storage, copy.dst_dtype, copy.dst_offset, copy.sizes, copy.dst_strides))
            self._src.append(src.view(copy.src_storage, copy.src_dtype, copy.src_offset, copy.sizes, copy.src_strides))

    @staticmethod
    def _bytes(memory: Memory, storage: int, offset: int, run: Run) -> torch.Tensor:
        return memory.storages[storage][offset : offset + run.nbytes]

    def __len__(self) -> int:
        return len(self._dst)

    @torch.no_grad()
    def run(self) -> int:
        """Copy everything; returns the bytes written. On a GPU the work is queued on the current stream."""
        if self._dst:
            torch._foreach_copy_(self._dst, self._src)
        return self.nbytes
