"""Records of all tensor-parallel ranks, exchanged over the engine's own group. Nothing is unpickled."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

GATHER_TIMEOUT_S = 120.0
"""The longest that one rank may take for a call before the others give the call up; a commit has a deadline of its own, which is shorter."""


def gather(record: dict[str, Any], group: Any, world_size: int) -> list[dict[str, Any]]:
    """One record of each rank, in the order of ranks; a collective call."""
    if world_size == 1:
        return [record]
    mine = torch.frombuffer(bytearray(msgspec.msgpack.encode(record)), dtype=torch.uint8)
    sizes = _all(torch.tensor([mine.numel()], dtype=torch.int64, device="cpu"), group, world_size)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    padded[: mine.numel()] = mine
    parts = _all(padded, group, world_size)
    return [
        msgspec.msgpack.decode(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)
    ]


def _all(mine: torch.Tensor, group: Any, world_size: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    work = dist.all_gather(parts, mine, group=group, async_op=True)
    work.wait(timedelta(seconds=GATHER_TIMEOUT_S))
    return parts
