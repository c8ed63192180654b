"""Spans: a bucket's bytes as pieces of memory, in the order in which they travel.

A piece whose values are contiguous here, in the type that travels, is a span of the weights' own memory: nothing is packed. All
other bytes of the bucket, padding included, are spans of a buffer, which a Replay fills before they are sent, or empties once they
have come. The two sides of a pair need not cut a bucket alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightcast.memory import Memory
from weightcast.plan import as_run
from weightcast.replay import Replay
from weightcast.transports.buckets import Bucket, Piece, into_bucket, out_of_bucket


class Loading:
    """How a bucket is sent out of a memory: ``run()``, then send ``spans``."""

    def __init__(self, bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
        direct, packed = [], []
        for piece in bucket.pieces:
            copy = into_bucket(piece)
            run = as_run(copy)
            if run is None:
                packed.append(copy)
            else:
                direct.append((piece, memory.storages[run.src_storage][run.src_offset : run.src_offset + run.nbytes]))
        self.spans = _spans(bucket, direct, buffer)
        self._replay = Replay(packed, memory, Memory([buffer])) if packed else None

    def run(self) -> None:
        """Pack what cannot be sent from where it lies."""
        if self._replay is not None:
            self._replay.run()


class Unloading:
    """How a bucket is received into a memory: receive into ``spans``, then ``run()``."""

    def __init__(self, bucket: Bucket, buffer: torch.Tensor, memory: Memory) -> None:
        direct, packed = [], []
        for piece in bucket.pieces:
            copy = out_of_bucket(piece)
            run = as_run(copy)
            if run is None:
                packed.append(copy)
            else:
                direct.append((piece, memory.storages[run.dst_storage][run.dst_offset : run.dst_offset + run.nbytes]))
        self.spans = _spans(bucket, direct, buffer)
        self._replay = Replay(packed, Memory([buffer]), memory) if packed else None

    def run(self) -> None:
        """Bring to its place what could not be received there."""
        if self._replay is not None:
            self._replay.run()


def _spans(bucket: Bucket, direct: Iterable[tuple[Piece, torch.Tensor]], buffer: torch.Tensor) -> list[memoryview]:
    spans, end = [], 0
    for piece, values in direct:
        if piece.offset > end:
            spans.append(_view(buffer[end : piece.offset]))
        spans.append(_view(values))
        end = piece.offset + values.numel()
    if bucket.nbytes > end:
        spans.append(_view(buffer[end : bucket.nbytes]))
    return spans


def _view(values: torch.Tensor) -> memoryview:
    return memoryview(values.detach().numpy())  # type: ignore[arg-type]
