"""Runs on a GPU: thousands of byte ranges as one table and one kernel launch.

A table is built once, from addresses; the caller keeps the memory behind them alive. Runs are cut into tiles, one tile is
one program of the launch, so one 16 GB run and 9,435 small ones both keep every multiprocessor busy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from weightcast.errors import InvalidInput

COPY_TILE_NBYTES = 32 * 1024
COPY_CHUNK_WORDS = 2048
COPY_WARPS = 8
SWAP_CHUNK_WORDS = 2048
SWAP_WARPS = 8

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True when kernels are interpreted on the CPU (TRITON_INTERPRET=1), which tests on machines without a GPU use."""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make the device current, as kernel launches need it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Launch:
    """A kernel with the arguments of all its launches, whose tensors it keeps alive; nothing where it has no programs."""

    def __init__(
        self, kernel: Any, num_programs: int, device: torch.device, arguments: Sequence[torch.Tensor], **constants: Any
    ) -> None:
        self._kernel, self._num_programs, self._device = kernel, num_programs, device
        self._arguments, self._constants = tuple(arguments), constants

    def warm_up(self) -> None:
        """Compile the kernel for these arguments and load it onto the GPU, without running it. The first ``run`` would do both,
        which takes hundreds of milliseconds where nothing is in Triton's cache."""
        if not self._num_programs or INTERPRETED:
            return
        grid = (self._num_programs,)
        with on_device(self._device):
            compiled = self._kernel.warmup(*self._arguments, grid=grid, **self._constants)
            if compiled is not None:
                compiled[grid]  # a compiled kernel is loaded when it is first asked for a launcher

    def run(self) -> None:
        """Queue the kernel on the current stream of the device."""
        if self._num_programs:
            with on_device(self._device):
                self._kernel[(self._num_programs,)](*self._arguments, **self._constants)


class TileTable:
    """Which run, and which part of it, each program of a launch works on.

    ``num_tiles_per_run[i]`` programs belong to run i, in order. ``tile_runs[p]`` is the run of program p and
    ``first_tiles[i]`` the first program of run i.
    """

    def __init__(self, num_tiles_per_run: torch.Tensor, device: torch.device) -> None:
        counts = num_tiles_per_run.to(torch.int64)
        numbers = torch.arange(counts.numel(), dtype=torch.int32, device="cpu")
        self.num_tiles = int(counts.sum())
        self.tile_runs = torch.repeat_interleave(numbers, counts).to(device)
        self.first_tiles = (counts.cumsum(0) - counts).to(device)


class _PairTable:
    """Pairs of equally long byte ranges on one GPU, as addresses (or page-locked host memory that the GPU can reach)."""

    def __init__(self, pairs: Sequence[tuple[int, int, int]], device: torch.device, *, swap: bool) -> None:
        table = torch.tensor([pair for pair in pairs if pair[2]], dtype=torch.int64, device="cpu").reshape(-1, 3)
        self.nbytes = int(table[:, 2].sum())
        tiles = TileTable(-(-table[:, 2] // COPY_TILE_NBYTES), device)
        self.launch = Launch(
            _pair_tiles,
            tiles.num_tiles,
            device,
            (*table.T.contiguous().to(device).unbind(), tiles.first_tiles, tiles.tile_runs),
            SWAP=swap,
            TILE=COPY_TILE_NBYTES,
            CHUNK=SWAP_CHUNK_WORDS if swap else COPY_CHUNK_WORDS,
            num_warps=SWAP_WARPS if swap else COPY_WARPS,
        )


class CopyRuns:
    """Copies of byte ranges, compiled once: ``(source address, destination address, bytes)`` each.

    No destination may overlap any other range. ``run()`` queues one kernel on the current stream.
    """

    def __init__(self, runs: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self._table = _PairTable(runs, device, swap=False)
        self.nbytes = self._table.nbytes

    def warm_up(self) -> None:
        """Compile what ``run`` launches."""
        self._table.launch.warm_up()

    def run(self) -> int:
        """Queue all copies; returns the bytes written."""
        self._table.launch.run()
        return self.nbytes


class SwapRuns:
    """Exchanges of byte ranges, compiled once: ``(address, address, bytes)`` each, none overlapping another."""

    def __init__(self, pairs: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        _refuse_overlap(pairs)
        self._table = _PairTable(pairs, device, swap=True)
        self.nbytes = self._table.nbytes

    def warm_up(self) -> None:
        """Compile what ``run`` launches."""
        self._table.launch.warm_up()

    def run(self) -> int:
        """Queue all exchanges; returns the bytes of one side."""
        self._table.launch.run()
        return self.nbytes


def _refuse_overlap(pairs: Sequence[tuple[int, int, int]]) -> None:
    """An exchange of overlapping ranges has no meaning."""
    ranges = sorted((start, start + nbytes) for a, b, nbytes in pairs if nbytes for start in (a, b))
    for (_, end), (start, _) in itertools.pairwise(ranges):
        if start < end:
            raise InvalidInput("the two sides of a swap, or two swaps, overlap in memory")


@triton.jit  # type: ignore[untyped-decorator]
def _pair_tiles(  # type: ignore[no-untyped-def]
    firsts,
    seconds,
    sizes,
    first_tiles,
    tile_runs,
    SWAP: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Copy first to second, or exchange them. All reads of a lane come before its writes."""
    pid = tl.program_id(0)
    run = tl.load(tile_runs + pid)
    start = (pid - tl.load(first_tiles + run)).to(tl.int64) * TILE
    first = tl.load(firsts + run) + start
    second = tl.load(seconds + run) + start
    nbytes = tl.minimum(tl.load(sizes + run) - start, TILE)
    offsets = tl.arange(0, CHUNK)
    if ((first | second) % 16 == 0) & (nbytes == TILE):
        a = tl.multiple_of(first.to(tl.pointer_type(tl.int64)), 16)
        b = tl.multiple_of(second.to(tl.pointer_type(tl.int64)), 16)
        for at in tl.static_range(0, TILE // 8, CHUNK):
            x = tl.load(a + at + offsets)
            if SWAP:
                y = tl.load(b + at + offsets)
                tl.store(a + at + offsets, y)
            tl.store(b + at + offsets, x)
    else:
        num_words = tl.where((first | second) % 8 == 0, nbytes // 8, 0)
        c = first.to(tl.pointer_type(tl.int64))
        d = second.to(tl.pointer_type(tl.int64))
        for at in range(0, num_words, CHUNK):
            mask = at + offsets < num_words
            x = tl.load(c + at + offsets, mask=mask)
            if SWAP:
                y = tl.load(d + at + offsets, mask=mask)
                tl.store(c + at + offsets, y, mask=mask)
            tl.store(d + at + offsets, x, mask=mask)
        e = first.to(tl.pointer_type(tl.int8))
        f = second.to(tl.pointer_type(tl.int8))
        for at in range(num_words * 8, nbytes, CHUNK):
            mask = at + offsets < nbytes
            z = tl.load(e + at + offsets, mask=mask)
            if SWAP:
                w = tl.load(f + at + offsets, mask=mask)
                tl.store(e + at + offsets, w, mask=mask)
            tl.store(f + at + offsets, z, mask=mask)
