"""Filling: how a stream's tensors get into windows: on a CPU they are digested on their way, on a GPU copied by a stream of their own.

On a CPU a block is read back from where it was just written, while it is in the cache, so the digest of a window costs no second look at
the window (see cpu.kernels).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from weightcast.cpu import kernels_for
from weightcast.cuda.wait import new_event, new_stream, wait_event
from weightcast.deadline import Deadline
from weightcast.digest.formula import MASK, WORD_NBYTES, word_weights
from weightcast.digest.regions import run_of
from weightcast.layout import Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import itemsize_of
from weightcast.sources.shards import has_other_bytes

ALONE_NBYTES = 4 * 2**20
"""So many bytes are written by one thread; of more torch's number of threads write parts."""


class Piece(NamedTuple):
    """A box of a tensor in its window. ``fills``: nothing comes into the window after it."""

    placement: Placement
    is_whole: bool
    fills: bool

    @property
    def window(self) -> int:
        return self.placement.storage


class Filling:
    """Writes pieces into a memory, and knows of each window the digest of what it wrote there. Not thread-safe."""

    def __init__(self, manifest: Manifest, pieces: Iterable[Piece], memory: Memory) -> None:
        pieces = list(pieces)
        self._views = {_key(piece): _view(piece.placement, memory) for piece in pieces}
        self._runs = {_key(piece): run_of(piece.placement, manifest) for piece in pieces}
        nbytes = sum(piece.placement.region.numel * itemsize_of(piece.placement.dtype) for piece in pieces)
        on_gpu = any(storage.is_cuda for storage in memory.storages[:1])
        self._kernels = None if on_gpu else kernels_for(nbytes)
        self._weights = word_weights(torch.device("cpu")).numpy()
        self._stream: torch.cuda.Stream | None = None
        self._digests: dict[int, int | None] = {}

    def begin(self, window: int) -> None:
        """Nothing is in the window yet."""
        self._digests[window] = 0 if self._kernels is not None else None

    def digest(self, window: int) -> int | None:
        """The digest of all that was written into a window since ``begin``; None where not all of it was digested on its way."""
        return self._digests.get(window)

    def write(self, piece: Piece, tensor: torch.Tensor, deadline: Deadline) -> None:
        """Copy a box of the tensor to its place; returns when it is there, as the tensor may be overwritten then."""
        if not piece.is_whole:
            tensor = _box(tensor, piece.placement.region)
        target = self._views[_key(piece)]
        if target.is_cuda:
            self._copy_on_gpu(target, tensor, deadline)
            return
        known = self._digests.get(piece.window)
        added = None if known is None or self._kernels is None else self._proven(self._kernels, piece, target, tensor)
        if added is None:
            _copy(target, tensor)
        self._digests[piece.window] = None if known is None or added is None else (known + added) & MASK

    def _proven(self, kernels: ModuleType, piece: Piece, target: torch.Tensor, tensor: torch.Tensor) -> int | None:
        """Copy and digest in one pass; None, and nothing is copied, where that cannot be. A cast or a strided tensor is digested right
        behind its copy."""
        run = self._runs[_key(piece)]
        if run is None or not run.nbytes:
            return 0 if run is not None else None
        address, position = target.data_ptr(), run.position
        if (
            tensor.is_cuda
            or tensor.dtype != target.dtype
            or not tensor.is_contiguous()
            or has_other_bytes(tensor)
            or tensor.data_ptr() % WORD_NBYTES
        ):
            if (address | position) % WORD_NBYTES:
                return None
            _copy(target, tensor)
            return self._run(kernels, address, address, position, run.nbytes)
        if (address | position) % WORD_NBYTES:
            return None
        return self._run(kernels, tensor.data_ptr(), address, position, run.nbytes)

    def _run(self, kernels: ModuleType, source: int, target: int, position: int, nbytes: int) -> int:
        if nbytes > ALONE_NBYTES and torch.get_num_threads() > 1:
            from weightcast.cpu.runs import Pieces

            return Pieces([(source, target, position, nbytes)], kernels.copy_and_digest_ranges).run()
        table = np.array([source, target, position // WORD_NBYTES, nbytes], dtype=np.int64)
        return int(kernels.copy_and_digest_ranges(table[:1], table[1:2], table[2:3], table[3:], self._weights)) & MASK

    def _copy_on_gpu(self, target: torch.Tensor, tensor: torch.Tensor, deadline: Deadline) -> None:
        if self._stream is None:
            self._stream = new_stream(target.device)
        done = new_event()
        with torch.cuda.stream(self._stream):
            _copy(target, tensor)
            done.record(self._stream)
        wait_event(done, deadline, "copying a tensor of the stream", lambda: None)


@torch.no_grad()
def _copy(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.copy_(tensor)


@torch.no_grad()
def _box(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _key(piece: Piece) -> tuple[str, tuple[int, ...]]:
    return piece.placement.region.name, piece.placement.region.offsets


def _view(placement: Placement, memory: Memory) -> torch.Tensor:
    sizes, strides = placement.region.sizes, placement.strides
    return memory.view(placement.storage, placement.dtype, placement.offset, sizes, strides)
