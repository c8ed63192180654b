"""Gathered: whole tensors of DTensors, by collective calls of all ranks that hold them. Each of the calls ends with a deadline.

Load-bearing: ranks make the same calls in the same order. What might keep one of them from a call is told to all by ``all_agree``
before the first.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist

from weightcast.cuda.wait import wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, StateError, WeightcastError
from weightcast.sources.shards import shard_of

OTHERS_DIFFER = "adapters of this rank are not those of the other ranks"
"""What a rank says also where it is another one that cannot go on."""
ALIKE_HINT = "Change adapters on every rank in the same way before publish()"


GLOO_CUTS = timedelta(milliseconds=2)
"""Gloo cuts limits to whole milliseconds: a wait that ends by the deadline must not end before the deadline."""


def all_agree(shard: torch.Tensor, said: bytes | None, deadline: Deadline) -> bool:
    """Whether every rank of a DTensor's mesh says the same, and none of them says None."""
    mesh: Any = shard.device_mesh  # type: ignore[attr-defined]
    number = 0 if said is None else int.from_bytes(sha256(said).digest()[:7], "big")
    votes = torch.tensor([said is not None, number, -number], dtype=torch.int64, device=_device_of(mesh))
    for dim in range(mesh.ndim):
        _wait(dist.all_reduce(votes, dist.ReduceOp.MIN, group=mesh.get_group(dim), async_op=True), votes, deadline)
    _settle(votes, deadline)
    well, least, most = votes.tolist()
    return bool(well) and least == -most


def check_together(shard: torch.Tensor | None, check: Callable[[], bytes], deadline: Deadline) -> None:
    """Raise what ``check`` raises; where ranks hold shards, raise StateError on every rank also for what another rank raises, and where
    ranks differ in what ``check`` returns."""
    if shard is None:
        check()
        return
    failure, said = None, None
    try:
        said = check()
    except WeightcastError as error:
        failure = error
    agreed = all_agree(shard, said, deadline)
    if failure is not None:
        raise failure
    if not agreed:
        raise StateError(OTHERS_DIFFER, hint=ALIKE_HINT)


def whole_of(value: torch.Tensor, deadline: Deadline) -> torch.Tensor:
    """All values of a DTensor, in memory of their own, on the device of this rank's part."""
    distributed: Any = value
    mesh, placements = distributed.device_mesh, distributed.placements
    shapes = [list(value.shape)]
    for dim, placement in enumerate(placements):
        shape = list(shapes[-1])
        if not placement.is_replicate():
            shape[placement.dim] = _sizes(shape[placement.dim], mesh.size(dim))[mesh.get_local_rank(dim)]
        shapes.append(shape)
    local: torch.Tensor = shard_of(value).detach()
    found = local.to(_device_of(mesh))
    for dim in reversed(range(mesh.ndim)):
        if not placements[dim].is_replicate():
            found = _joined(found, placements[dim].dim, shapes[dim], mesh.get_group(dim), deadline)
    _settle(found, deadline)
    return found.clone() if found is local else found.to(local.device)


def _joined(
    part: torch.Tensor, dim: int, shape: list[int], group: dist.ProcessGroup, deadline: Deadline
) -> torch.Tensor:
    """The parts of all ranks of a group, one after the other along a dimension; each is sent as large as the largest."""
    sizes = _sizes(shape[dim], dist.get_world_size(group))
    padded = [*shape[:dim], sizes[0], *shape[dim + 1 :]]
    sent = part.new_zeros(padded)
    sent.narrow(dim, 0, part.shape[dim]).copy_(part)
    came = part.new_empty([len(sizes), *padded])
    # As bytes: not every backend knows every type.
    _wait(dist.all_gather([_bytes(each) for each in came], _bytes(sent), group, async_op=True), came, deadline)
    return torch.cat([each.narrow(dim, 0, size) for each, size in zip(came, sizes, strict=True)], dim)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1).view(torch.uint8)


def _sizes(length: int, parts: int) -> list[int]:
    """How many of so many rows each rank has: as torch.chunk cuts them."""
    most = -(-length // parts)
    return [max(0, min(most, length - rank * most)) for rank in range(parts)]


def _wait(work: Any, values: torch.Tensor, deadline: Deadline) -> None:
    """Return when a collective call is done; on a GPU when it is queued, as ``_settle`` waits for all of them."""
    try:
        if values.is_cuda:
            work.wait()
        else:
            work.wait(deadline.limit() + GLOO_CUTS)
    except RuntimeError as error:
        if deadline.passed:
            raise DeadlineExceeded(
                f"the other ranks did not gather weights with this one within {deadline.timeout_s:g} s",
                hint="Every rank has to call connect() and publish(), in the same order",
            ) from error
        raise PeerLost(f"weights could not be gathered from the other ranks: {error}") from error


def _settle(values: torch.Tensor, deadline: Deadline) -> None:
    if values.is_cuda:
        wait_stream(values.device, deadline, "gathering weights from the other ranks")


def _device_of(mesh: Any) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
