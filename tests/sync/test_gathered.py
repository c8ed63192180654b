"""Gathering over a mesh: what each rank gets is the whole tensor, however its parts are cut; what keeps ranks apart is told to all."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, WeightcastError
from weightcast.sources.gathered import all_agree, whole_of
from weightcast.testing.ranks import run_ranks

SHAPES = [(7, 5), (4, 2, 3), (1, 3), (8,), (3, 0)]


def gather(rank: int, size: int, folder: str) -> list[bool]:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(3)
    told = []
    for mesh in (init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))):
        for shape, dtype in product(SHAPES, (torch.float32, torch.bfloat16, torch.uint8)):
            whole = torch.randn(shape).mul(50).to(dtype)
            ways = [Replicate(), *map(Shard, range(len(shape)))]
            for placements in product(ways, repeat=mesh.ndim):
                found = whole_of(distribute_tensor(whole, mesh, placements), Deadline(20))
                assert torch.equal(found, whole), (shape, dtype, placements)
        shard = distribute_tensor(torch.randn(6), mesh, [Shard(0)] * mesh.ndim)
        told += [
            all_agree(shard, said, Deadline(20)) for said in (b"a", b"a" if rank else b"b", b"a" if rank else None)
        ]
    if rank:
        store.wait(["rank 0 gave up"])  # rank 0 waits for a call that nobody makes
    else:
        with pytest.raises(DeadlineExceeded, match=r"did not gather weights with this one within 0\.3 s") as caught:
            whole_of(shard, Deadline(0.3))
        assert isinstance(caught.value, WeightcastError)
        store.set("rank 0 gave up", "")
    return told


def test_every_rank_gets_the_whole_of_every_tensor(tmp_path: object) -> None:
    assert run_ranks(gather, 4, str(tmp_path)) == [[True, False, False] * 2] * 4
