"""Spans: a bucket's bytes as pieces of memory, in the order in which they travel.

A piece whose values are contiguous here, in the type that travels, is a span of the weights' own memory: nothing is packed. All
other bytes of the bucket, padding included, are spans of a buffer, which a Replay fills before they are sent, or empties once they
have come. The two sides of a pair need not cut a bucket alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from weightcast.layout.memory import Memory
from weightcast.plan import Copy, Run, as_run
from weightcast.plan.replay import Replay
from weightcast.transports.buckets import Bucket, into_bucket, out_of_bucket


class Loading:
    """How a bucket is sent out of a memory: ``run()``, then send ``spans``."""

    def __init__(self, bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
        copies = [into_bucket(piece) for piece in bucket.pieces]
        direct, packed = _split(copies, memory, lambda run: (run.src_storage, run.src_offset))
        self.spans = _spans(bucket, direct, buffer)
        self._replay = Replay(packed, memory, Memory([buffer])) if packed else None

    def run(self) -> None:
        """Pack what cannot be sent from where it lies."""
        if self._replay is not None:
            self._replay.run()


class Unloading:
    """How a bucket is received into a memory: receive into ``spans``, then ``run()``."""

    def __init__(self, bucket: Bucket, buffer: torch.Tensor, memory: Memory) -> None:
        copies = [out_of_bucket(piece) for piece in bucket.pieces]
        direct, packed = _split(copies, memory, lambda run: (run.dst_storage, run.dst_offset))
        self.spans = _spans(bucket, direct, buffer)
        self._replay = Replay(packed, Memory([buffer]), memory) if packed else None

    def run(self) -> None:
        """Bring to its place what could not be received there."""
        if self._replay is not None:
            self._replay.run()


def _split(
    copies: Sequence[Copy], memory: Memory, place: Callable[[Run], tuple[int, int]]
) -> tuple[dict[int, torch.Tensor], list[Copy]]:
    """The bytes of copies that are runs of ``memory`` (storage and byte as ``place`` says), by number, and the copies that are none."""
    direct, packed = {}, []
    for number, copy in enumerate(copies):
        run = as_run(copy)
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
    return memoryview(values.detach().numpy())  # type: ignore[arg-type]
