"""Which ranks publish a source together, where the user gave no process group: told by the source, or asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from weightcast.errors import InvalidInput
from weightcast.sources.parts import parts_of
from weightcast.sources.shards import is_distributed

GivenGroup = dist.ProcessGroup | Literal["auto"] | None
"""``process_group`` of a Publisher: a group, None for this rank alone, or "auto"."""
HINT = (
    "Give process_group=torch.distributed.group.WORLD where every rank makes a Publisher, or another group of those that do\n"
    "Give process_group=None to publish what this rank holds from this rank alone"
)


def chosen_group(given: GivenGroup, source: object) -> dist.ProcessGroup | None:
    """The process group that publishes ``source``, or None for this rank alone.

    With "auto" and several ranks in torch.distributed that is the default group for a module or mapping with DTensors whose mesh
    covers all ranks, for a module that DistributedDataParallel wraps for all ranks, and for a module in a process whose ranks
    accelerate started as replicas (as under TRL). Raises InvalidInput for any other source.
    """
    if isinstance(given, str):
        if given != "auto":
            raise InvalidInput(f"process_group is a group, None or 'auto', not {given!r}", field="process_group")
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        _require_all_ranks(source)
        return dist.group.WORLD
    if given is None:
        return None
    if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
        raise InvalidInput(
            f"process_group is a group, None or 'auto', not {given!r}",
            field="process_group",
            hint="Give what torch.distributed.new_group() returned, or torch.distributed.group.WORLD",
        )
    return None if dist.get_world_size(given) == 1 else given


def _require_all_ranks(source: object) -> None:
    """Raise InvalidInput unless the source tells that all ranks have a part or a replica of it."""
    size = dist.get_world_size()
    parts = parts_of(source)
    ranks = next(filter(None, (find(part) for find in (_ranks_of_shards, _ranks_of_replicas) for part in parts)), None)
    if ranks == frozenset(range(size)):
        return
    what = f"is of ranks {sorted(ranks)}" if ranks else "does not tell which of them publish it"
    raise InvalidInput(f"torch.distributed has {size} ranks, and the source {what}", field="process_group", hint=HINT)


def _ranks_of_shards(source: object) -> frozenset[int]:
    """The ranks of the mesh that the first DTensor's mesh was cut from; empty where there is no DTensor."""
    first: Any = next(filter(is_distributed, _tensors(source)), None)
    if first is None:
        return frozenset()
    mesh = first.device_mesh
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    return frozenset(root.mesh.flatten().tolist())


def _tensors(source: object) -> Iterable[torch.Tensor]:
    if isinstance(source, Mapping):
        return map(source.__getitem__, source)
    if not isinstance(source, nn.Module):
        return ()
    if any(kind.__name__ == "FSDPModule" for part in source.modules() for kind in type(part).__mro__):
        # Parameters may be gathered at the moment; a state dict has the shards.
        return source.state_dict().values()
    return source.parameters()


def _ranks_of_replicas(source: object) -> frozenset[int]:
    if not isinstance(source, nn.Module):
        return frozenset()
    for part in source.modules():
        if isinstance(part, nn.parallel.DistributedDataParallel):
            return frozenset(dist.get_process_group_ranks(part.process_group))
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    shared: Mapping[str, Any] = {} if state is None else state._shared_state
    kind, size = getattr(shared.get("distributed_type"), "value", "NO"), shared.get("num_processes", 1)
    is_replicated = kind.startswith("MULTI_") or kind in ("DEEPSPEED", "XLA")
    return frozenset(range(size)) if is_replicated else frozenset()
