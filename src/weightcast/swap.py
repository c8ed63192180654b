"""Exchanging two sets of bytes in place: what a staged commit, and its roll-back, does to live parameters and shadow.

both on one GPU          one fused kernel: each side is read once and written once, at memory speed, no scratch memory
both on the CPU          chunk by chunk through a scratch that stays in the second-level cache
GPU and pinned host      streamed through two scratch buffers on the GPU, both directions of the bus at once
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from weightcast.cuda_wait import new_event, new_stream
from weightcast.errors import InvalidInput, Unsupported

CPU_CHUNK_NBYTES = 256 * 1024
HOST_CHUNK_NBYTES = 32 * 2**20

Pair = tuple[torch.Tensor, torch.Tensor]


class _Swapper(Protocol):
    def run(self) -> int: ...


def swap_bytes(first: torch.Tensor, second: torch.Tensor) -> None:
    """Exchange two equally large, contiguous uint8 tensors that do not overlap; on a GPU the work is queued."""
    Swap([(first, second)]).run()


class Swap:
    """Exchanges compiled once: pairs of equally large, contiguous 1-D uint8 tensors, none overlapping another.

    All pairs have to be of one kind (see the module); a GPU side and a host side may come in either order.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        for first, second in pairs:
            _check(first, second)
        self._pairs = [(first, second) for first, second in pairs if first.numel()]
        self.nbytes = sum(first.numel() for first, _ in self._pairs)
        self._swapper = _swapper(self._pairs)

    def run(self) -> int:
        """Exchange all pairs; returns the bytes of one side.

        With a GPU involved the work is queued on its current stream; wait for that stream before using either side.
        """
        return self._swapper.run()


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    for tensor in (first, second):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise InvalidInput("what is swapped is a contiguous 1-D uint8 tensor")
    if first.numel() != second.numel():
        raise InvalidInput(f"cannot swap {first.numel()} with {second.numel()} bytes")


def _swapper(pairs: Sequence[Pair]) -> _Swapper:
    kinds = {(first.device.type, second.device.type) for first, second in pairs}
    if kinds <= {("cpu", "cpu")}:
        return _CpuSwap(pairs)
    if kinds == {("cuda", "cuda")}:
        devices = {tensor.device for pair in pairs for tensor in pair}
        if len(devices) > 1:
            raise Unsupported("a swap between several GPUs", hint="Keep the shadow on the GPU of the parameters")
        from weightcast.cuda_runs import SwapRuns

        triples = [(first.data_ptr(), second.data_ptr(), first.numel()) for first, second in pairs]
        return SwapRuns(triples, devices.pop())
    if kinds <= {("cuda", "cpu"), ("cpu", "cuda")}:
        return _HostSwap([(a, b) if a.is_cuda else (b, a) for a, b in pairs])
    raise Unsupported(f"a swap between {sorted(kinds)}", hint="Make one Swap for each kind")


class _CpuSwap:
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._nbytes = sum(first.numel() for first, _ in pairs)
        self._scratch = torch.empty(CPU_CHUNK_NBYTES if pairs else 0, dtype=torch.uint8)
        _refuse_overlap(pairs)

    def run(self) -> int:
        for pair in self._pairs:
            for a, b in _parts(pair, CPU_CHUNK_NBYTES):
                scratch = self._scratch[: a.numel()]
                scratch.copy_(a)
                a.copy_(b)
                b.copy_(scratch)
        return self._nbytes


class _HostSwap:
    """GPU and page-locked host memory: while one chunk goes up, the one before goes down."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        _refuse_overlap(pairs)
        devices = {live.device for live, _ in pairs}
        if len(devices) > 1:
            raise Unsupported("a swap of several GPUs with the host", hint="Make one Swap for each GPU")
        for _, host in pairs:
            if not host.is_pinned():
                raise InvalidInput(
                    "the host side of a swap with a GPU has to be page-locked", hint="Use pin_memory=True"
                )
        self._device = devices.pop()
        self._chunks = [part for pair in pairs for part in _parts(pair, HOST_CHUNK_NBYTES)]
        self._nbytes = sum(live.numel() for live, _ in pairs)
        size = max(live.numel() for live, _ in self._chunks)
        self._scratch = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._up, self._down = new_stream(self._device), new_stream(self._device)

    def run(self) -> int:
        current = torch.cuda.current_stream(self._device)
        self._up.wait_stream(current)
        self._down.wait_stream(current)
        emptied = [new_event(), new_event()]
        for number, (live, host) in enumerate(self._chunks):
            scratch = self._scratch[number % 2][: live.numel()]
            with torch.cuda.stream(self._up):
                if number >= 2:
                    self._up.wait_event(emptied[number % 2])
                scratch.copy_(host, non_blocking=True)
                arrived = self._up.record_event()
            with torch.cuda.stream(self._down):
                self._down.wait_event(arrived)
                host.copy_(live, non_blocking=True)
                live.copy_(scratch)
                emptied[number % 2].record(self._down)
        current.wait_stream(self._down)
        return self._nbytes


def _parts(pair: Pair, max_nbytes: int) -> Iterator[Pair]:
    for start in range(0, pair[0].numel(), max_nbytes):
        yield pair[0][start : start + max_nbytes], pair[1][start : start + max_nbytes]


def _refuse_overlap(pairs: Sequence[Pair]) -> None:
    """An exchange of overlapping bytes has no meaning."""
    ranges = sorted((t.device.type, t.data_ptr(), t.data_ptr() + t.numel()) for pair in pairs for t in pair)
    for (kind, _, end), (other, start, _) in itertools.pairwise(ranges):
        if kind == other and start < end:
            raise InvalidInput("the two sides of a swap, or two swaps, overlap in memory")
