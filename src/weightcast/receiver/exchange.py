"""How a staged commit makes a version live where parameters may not move: exchange with a shadow, or copy out of one of two.

exchange   one shadow: what was live is in it afterwards; each side is read and written
alternate  two shadows, one of which equals what is live: a commit is one copy, half the traffic, and the way back is the other
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weightcast.layout import Placement
from weightcast.manifest import Manifest
from weightcast.memory import Memory
from weightcast.plan import Copy, merge
from weightcast.replay import Replay
from weightcast.swap import Swap

if TYPE_CHECKING:
    from weightcast.cuda.proven import ProvenReplay


class Exchange:
    """Compiled once for a pair of memories with the same layout; ``run()`` twice is nothing."""

    def __init__(self, live: Memory, shadow: Memory, placements: Sequence[Placement]) -> None:
        runs, rest = merge(distinct_copies(placements))
        spans: dict[int, list[tuple[int, int]]] = {}
        for run in runs:
            spans.setdefault(run.dst_storage, []).append((run.dst_offset, run.dst_offset + run.nbytes))
        self._swap = Swap(
            [
                (live.storages[number][start:end], shadow.storages[number][start:end])
                for number, parts in spans.items()
                for start, end in _union(parts)
            ]
        )
        self._strided = [
            tuple(
                memory.view(copy.dst_storage, copy.dst_dtype, copy.dst_offset, copy.sizes, copy.dst_strides)
                for memory in (live, shadow)
            )
            for copy in rest
        ]

    def prepare(self) -> None:
        """Compile what the first ``run`` would; nothing is exchanged."""
        self._swap.prepare()

    @torch.no_grad()
    def run(self) -> None:
        """Swap all values. On a GPU the work is queued on the current stream."""
        self._swap.run()
        for live, shadow in self._strided:
            kept = live.clone()
            live.copy_(shadow)
            shadow.copy_(kept)


class Landing:
    """The copy of all landings from a shadow to live storages, compiled once; on a GPU with the digest of what landed."""

    def __init__(self, live: Memory, shadow: Memory, placements: Sequence[Placement], manifest: Manifest) -> None:
        copies = distinct_copies(placements)
        device = live.storages[0].device if live.storages else torch.device("cpu")
        self._proven: ProvenReplay | None = None
        self._replay: Replay | ProvenReplay
        if device.type == "cuda":
            from weightcast.cuda.proven import ProvenReplay

            self._replay = self._proven = ProvenReplay(copies, shadow, live, manifest, device)
        else:
            self._replay = Replay(copies, shadow, live)
        self._is_all = len(copies) == len(placements)

    def prepare(self) -> None:
        """Compile what the first ``run`` would; nothing is copied."""
        if self._proven is not None:
            self._proven.prepare()

    def run(self) -> None:
        """On a GPU the work is queued on the current stream."""
        self._replay.run()

    def total(self) -> int | None:
        """The digest of all placements as they landed; None where it has to be computed."""
        return self._proven.total() if self._proven is not None and self._is_all else None


def distinct_copies(placements: Sequence[Placement]) -> list[Copy]:
    """Copies of placements to themselves, one for those that are the same bytes (tied tensors under several names)."""
    found: dict[tuple[object, ...], Copy] = {}
    for placement in placements:
        key = (placement.storage, placement.offset, placement.dtype, placement.region.sizes, placement.strides)
        found.setdefault(key, _self_copy(placement))
    return list(found.values())


def _union(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


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
