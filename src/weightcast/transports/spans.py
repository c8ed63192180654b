"""Spans: a bucket's bytes as pieces of memory, in the order in which they travel.

A piece whose values are contiguous here, in the type that travels, is a span of the weights' own memory where a socket reaches that:
nothing is packed. All other bytes of the bucket, padding included, are spans of a buffer, which a mover fills before they are sent, or
empties once they have come. The two sides of a pair need not cut a bucket alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, Run, as_run
from weightcast.transports.buckets import Bucket, into_bucket, out_of_bucket
from weightcast.transports.movers import Buffer, Mover


class Loading:
    """How a bucket is sent out of a memory: call ``run()``, then send ``spans``."""

    def __init__(self, bucket: Bucket, memory: Memory, buffer: Buffer, mover: Mover) -> None:
        copies = [into_bucket(piece) for piece in bucket.pieces]
        direct, packed = _split(copies, memory, mover, lambda run: (run.src_storage, run.src_offset))
        self.spans = _spans(bucket, direct, buffer.host)
        self._bucket, self._direct, self._buffer = bucket, direct, buffer.host
        self._pack = mover.step(packed, memory, Memory([buffer.near])) if packed else None

    def run(self, deadline: Deadline) -> None:
        """Pack the values that cannot be sent from where they lie."""
        if self._pack is not None:
            self._pack(deadline)

    def values(self) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each piece, after ``run()``: where they lie, or in the buffer."""
        return [
            _array(self._direct.get(number, self._buffer[piece.offset : piece.offset + piece.nbytes]))
            for number, piece in enumerate(self._bucket.pieces)
        ]


class Unloading:
    """How a bucket is received into a memory: receive into ``spans``, then call ``run()``."""

    def __init__(self, bucket: Bucket, buffer: Buffer, memory: Memory, mover: Mover) -> None:
        copies = [out_of_bucket(piece) for piece in bucket.pieces]
        direct, packed = _split(copies, memory, mover, lambda run: (run.dst_storage, run.dst_offset))
        self.spans = _spans(bucket, direct, buffer.host)
        self._unpack = mover.step(packed, Memory([buffer.near]), memory) if packed else None

    def run(self, deadline: Deadline) -> None:
        """Copy to their places the values that could not be received there."""
        if self._unpack is not None:
            self._unpack(deadline)


def _split(
    copies: Sequence[Copy], memory: Memory, mover: Mover, place: Callable[[Run], tuple[int, int]]
) -> tuple[dict[int, torch.Tensor], list[Copy]]:
    """The bytes of copies that are runs of ``memory`` (storage and byte as ``place`` says), by number, and the copies that are none."""
    direct, packed = {}, []
    for number, copy in enumerate(copies):
        run = as_run(copy) if mover.reaches_weights else None
        if run is None:
            packed.append(copy)
        else:
            storage, start = place(run)
            direct[number] = memory.storages[storage][start : start + run.nbytes]
    return direct, packed


def _spans(bucket: Bucket, direct: Mapping[int, torch.Tensor], buffer: torch.Tensor) -> list[memoryview]:
    spans, end = [], 0
    for number, values in direct.items():
        piece = bucket.pieces[number]
        if piece.offset > end:
            spans.append(_view(buffer[end : piece.offset]))
        spans.append(_view(values))
        end = piece.offset + values.numel()
    if bucket.nbytes > end:
        spans.append(_view(buffer[end : bucket.nbytes]))
    return spans


def _view(values: torch.Tensor) -> memoryview:
    return memoryview(_array(values))  # type: ignore[arg-type]


def _array(values: torch.Tensor) -> npt.NDArray[np.uint8]:
    return values.detach().numpy()
