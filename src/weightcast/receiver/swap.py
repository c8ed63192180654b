"""Exchanging two sets of bytes in place: what a staged commit, and its roll-back, does to live parameters and shadow.

both on one GPU          one fused kernel: each side is read once and written once, at memory speed, no scratch memory
both on the CPU          chunk by chunk through a scratch that stays in the second-level cache
GPU and pinned host      the same kernel, which reads and writes the host's memory over the bus, both directions at once
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from weightcast.errors import InvalidInput, Unsupported

CPU_CHUNK_NBYTES = 256 * 1024

Pair = tuple[torch.Tensor, torch.Tensor]


class _Swapper(Protocol):
    def warm_up(self) -> None: ...

    def run(self) -> int: ...


class Swap:
    """The exchange of pairs of equally large, contiguous 1-D uint8 tensors, compiled once. No tensor overlaps another one.

    Either all pairs lie on the CPU, or each pair has at least one side on a GPU; a GPU side and a host side may come in either order.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        for first, second in pairs:
            _check(first, second)
        self._pairs = [(first, second) for first, second in pairs if first.numel()]
        self.nbytes = sum(first.numel() for first, _ in self._pairs)
        self._swapper = _swapper(self._pairs)

    def warm_up(self) -> None:
        """Compile what the first ``run`` would compile. Exchanges nothing."""
        self._swapper.warm_up()

    def run(self) -> int:
        """Exchange all pairs and return the bytes of one side.

        Where a GPU is involved the work is queued on that GPU's current stream. Wait for that stream before you use either side.
        """
        return self._swapper.run()


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    for tensor in (first, second):
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise InvalidInput("what is swapped is a contiguous 1-D uint8 tensor")
    if first.numel() != second.numel():
        raise InvalidInput(f"cannot swap {first.numel()} with {second.numel()} bytes")


def _swapper(pairs: Sequence[Pair]) -> _Swapper:
    tensors = [tensor for pair in pairs for tensor in pair]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    if not devices:
        if any(tensor.device.type != "cpu" for tensor in tensors):
            raise Unsupported(f"a swap on {tensors[0].device.type}")
        return _CpuSwap(pairs)
    if len(devices) > 1:
        raise Unsupported("a swap between several GPUs", hint="Keep the shadow on the GPU of the parameters")
    if any(not tensor.is_cuda and not tensor.is_pinned() for tensor in tensors):
        raise InvalidInput("the host side of a swap with a GPU has to be page-locked", hint="Use pin_memory=True")
    from weightcast.cuda.runs import SwapRuns

    triples = [(first.data_ptr(), second.data_ptr(), first.numel()) for first, second in pairs]
    return SwapRuns(triples, devices.pop())


class _CpuSwap:
    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._nbytes = sum(first.numel() for first, _ in pairs)
        self._scratch = torch.empty(CPU_CHUNK_NBYTES if pairs else 0, dtype=torch.uint8, device="cpu")
        _refuse_overlap(pairs)

    def warm_up(self) -> None:
        """There is nothing to compile."""

    def run(self) -> int:
        for pair in self._pairs:
            for a, b in _parts(pair, CPU_CHUNK_NBYTES):
                scratch = self._scratch[: a.numel()]
                scratch.copy_(a)
                a.copy_(b)
                b.copy_(scratch)
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
