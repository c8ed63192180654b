"""What both sides of a nccl group have to agree in: the offer, and how the copies of a plan are cut into buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch

from weightcast.cuda.lanes import Lanes
from weightcast.errors import InvalidInput
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, parts_of
from weightcast.transports.buckets import Bucket, schedule
from weightcast.untrusted.secret import repr_without

TRAINER = 0
"""The trainer's rank in a communicator; workers follow in the order of the group."""
Parts = Mapping[int, Sequence[Bucket]]
"""The buckets of each part of a plan."""


class NcclOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The communicator's id, the worker's place in it, how the plan is cut (with the bytes of each bucket, to see that both sides
    cut alike), and where the trainer listens."""

    unique_id: bytes
    rank: int
    world_size: int
    bucket_nbytes: int
    cuts: tuple[int, ...]
    address: str
    port: int
    secret: bytes

    __repr__ = repr_without("secret", "unique_id")


def parts_in_buckets(copies: Sequence[Copy], bucket_nbytes: int) -> Parts:
    """Cut the copies of each part into buckets."""
    return {part: schedule(some, bucket_nbytes) for part, some in parts_of(copies).items()}


def cuts_of(parts: Parts) -> tuple[int, ...]:
    """Return the bytes of every bucket, which both sides compare."""
    return tuple(bucket.nbytes for buckets in parts.values() for bucket in buckets)


def lanes_for(parts: Parts, device: torch.device) -> Lanes:
    """Make buffers on a GPU that hold any of these buckets."""
    return Lanes(max(cuts_of(parts), default=0), device)


def device_of(memory: Memory, storages: Sequence[int]) -> torch.device:
    """Return the one GPU on which these storages lie. InvalidInput where they do not lie on one GPU."""
    if memory.gpu is not None:
        return memory.gpu
    devices = {memory.storages[storage].device for storage in storages}
    if len(devices) > 1 or any(device.type != "cuda" for device in devices):
        raise InvalidInput(f"one end of a nccl pair uses the memory of one GPU, not {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())
