"""Where values of several trainer ranks land in the same bytes, against all bytes looked at one by one."""

from __future__ import annotations

import random

import pytest

from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, compile_plan, ranks_meet

TENSORS, ROWS, COLUMNS, RANKS = 6, 8, 4, 3


def whole(name: str, dtype: str, storage: int, offset: int) -> Placement:
    box = Region(name=name, offsets=(0, 0), sizes=(ROWS, COLUMNS))
    return Placement(region=box, dtype=dtype, storage=storage, offset=offset, strides=(COLUMNS, 1))


def bytes_of(copy: Copy) -> set[tuple[int, int]]:
    size = itemsize_of(copy.dst_dtype)
    (rows, columns), (down, right) = copy.sizes, copy.dst_strides
    starts = [(copy.dst_offset + i * down + j * right) * size for i in range(rows) for j in range(columns)]
    return {(copy.dst_storage, start + byte) for start in starts for byte in range(size)}


def shards(specs: list[TensorSpec], rank: int, dim: int | None) -> Layout:
    """All of each tensor, or a rank's rows or columns of each."""
    offsets, sizes = [0, 0], [ROWS, COLUMNS]
    if dim is not None:
        bounds = [number * sizes[dim] // RANKS for number in (rank, rank + 1)]
        offsets[dim], sizes[dim] = bounds[0], bounds[1] - bounds[0]
    boxes = [Region(name=spec.name, offsets=tuple(offsets), sizes=tuple(sizes)) for spec in specs]
    strides = contiguous_strides(tuple(sizes))
    placements = [
        Placement(region=box, dtype=spec.dtype, storage=number, offset=0, strides=strides)
        for number, (spec, box) in enumerate(zip(specs, boxes, strict=True))
    ]
    nbytes = tuple(sizes[0] * sizes[1] * itemsize_of(spec.dtype) for spec in specs)
    return Layout(placements=tuple(placements), storage_nbytes=nbytes)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_ranks_meet_wherever_bytes_of_two_of_them_do(dim: int | None) -> None:
    seen = set()
    for seed in range(200):
        rng = random.Random(seed)
        specs = [
            TensorSpec(name=f"t{number}", dtype=rng.choice(["float32", "bfloat16"]), shape=(ROWS, COLUMNS))
            for number in range(TENSORS)
        ]
        manifest = Manifest(tensors=tuple(specs))
        # One after the other in two storages, and one of them anywhere.
        places = [
            whole(spec.name, spec.dtype, rng.randrange(2), 256 * at // itemsize_of(spec.dtype))
            for at, spec in enumerate(specs)
        ]
        stray = rng.randrange(TENSORS)
        offset = rng.choice([places[stray].offset, rng.randrange(64 * TENSORS)])
        places[stray] = whole(specs[stray].name, specs[stray].dtype, rng.randrange(2), offset)
        layout = Layout(placements=tuple(places), storage_nbytes=(4096, 4096))
        plan = compile_plan(manifest, {rank: shards(specs, rank, dim) for rank in range(RANKS)}, layout)
        filled = [set().union(*map(bytes_of, plan[rank])) for rank in plan]
        meet = sum(map(len, filled)) > len(set().union(*filled))
        said = ranks_meet(plan, LayoutTable.of(layout, manifest))
        seen.add((meet, said))
        assert said or not meet
        apart = [set().union(*(bytes_of(c) for r in plan for c in plan[r] if c.region.name == s.name)) for s in specs]
        assert not said or sum(map(len, apart)) > len(set().union(*apart)), "landings lie apart"
    assert {(True, True), (False, False)} <= seen
