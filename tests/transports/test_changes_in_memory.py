"""Changes of a bucket, found in one memory and brought to another, however values lie there: every byte, and the change of the digest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from weightcast import cpu
from weightcast.content.layout_digest import LayoutDigest
from weightcast.deadline import Deadline
from weightcast.digest.formula import MASK
from weightcast.layout import Layout, Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of
from weightcast.plan import Copy, landing_of
from weightcast.transports.buckets import Bucket, out_of_bucket, schedule
from weightcast.transports.changed import Changing
from weightcast.transports.counted import counted
from weightcast.transports.kept import Change, KeptBuckets, forms_of, shared_pieces
from weightcast.transports.movers import HostMover
from weightcast.transports.spans import Loading
from weightcast.transports.told import CHANGES, CHECKED, VALUES, Told, told

pytest.importorskip("numba", reason="kernels read what changes")

LANDS_AS = {"float32": "float64", "bfloat16": "float32"}
"""Casts of which torch gives the same bits for every NaN, however many values it casts at a time."""
GENERATOR = np.random.default_rng()


class Case(NamedTuple):
    manifest: Manifest
    copies: list[Copy]
    source: Memory
    target: Memory


def made(num: int) -> Case:
    """Parts of tensors of all types, from rows, columns and transposed tensors into rows, columns, transposed and fused ones, some cast."""
    specs, copies, ends = [], [], [0, 0]
    for number in range(num):
        dtype = str(GENERATOR.choice(DTYPE_NAMES))
        shape = tuple(int(n) for n in GENERATOR.integers(1, 12, GENERATOR.integers(0, 4)))
        specs.append(TensorSpec(name=f"t{number}", dtype=dtype, shape=shape))
        sizes = tuple(int(GENERATOR.integers(1, n + 1)) for n in shape)
        offsets = tuple(int(GENERATOR.integers(0, n - size + 1)) for n, size in zip(shape, sizes, strict=True))
        lands = LANDS_AS.get(dtype, dtype) if GENERATOR.random() < 0.3 else dtype
        places = [_place(ends, side, sizes, dtype_of(kind).itemsize) for side, kind in enumerate((dtype, lands))]
        copies.append(
            Copy(
                region=Region(name=f"t{number}", offsets=offsets, sizes=sizes),
                src_storage=0,
                src_dtype=dtype,
                src_offset=places[0][0],
                src_strides=places[0][1],
                dst_storage=0,
                dst_dtype=lands,
                dst_offset=places[1][0],
                dst_strides=places[1][1],
            )
        )
    memories = [Memory([torch.zeros(end + 64, dtype=torch.uint8)]) for end in ends]
    return Case(Manifest.of(specs), copies, *memories)


def _place(ends: list[int], side: int, sizes: tuple[int, ...], itemsize: int) -> tuple[int, tuple[int, ...]]:
    """An offset and strides, in elements, of a box that no other one overlaps: its dimensions in any order, with room between rows."""
    order = GENERATOR.permutation(len(sizes))
    padded = [sizes[dim] + int(GENERATOR.integers(0, 3)) for dim in order]
    strides = dict(zip(order.tolist(), contiguous_strides(padded), strict=True))
    start = -(-ends[side] // 16) * 16
    ends[side] = start + math.prod(padded) * itemsize
    return start // itemsize, tuple(strides[dim] for dim in range(len(sizes)))


def view(memory: Memory, copy: Copy, side: str) -> torch.Tensor:
    of = [getattr(copy, f"{side}_{name}") for name in ("storage", "dtype", "offset", "strides")]
    return memory.view(of[0], of[1], of[2], copy.sizes, of[3])


def moved(case: Case, share: float) -> None:
    """Some values of the source are others: by a unit or two, or any bits, NaN and -0.0 among them."""
    for copy in case.copies:
        values = view(case.source, copy, "src")
        bits = flat(values).numpy().reshape(-1, values.itemsize).copy()
        where = np.flatnonzero(GENERATOR.random(len(bits)) < share)
        if copy.src_dtype == "bool":
            bits[where] ^= 1
        else:
            low = GENERATOR.random(len(where)) < 0.7
            bits[where[low], 0] += GENERATOR.integers(0, 3, int(low.sum())).astype(np.uint8)
            bits[where[~low]] = GENERATOR.integers(0, 256, (int((~low).sum()), values.itemsize), np.uint8)
        values.copy_(torch.from_numpy(bits.reshape(-1)).view(values.dtype).reshape(copy.sizes))


def expected(case: Case) -> list[torch.Tensor]:
    return [view(case.source, copy, "src").to(dtype_of(copy.dst_dtype)) for copy in case.copies]


def flat(values: torch.Tensor) -> torch.Tensor:
    """A copy's bytes, row by row."""
    return torch.empty(values.numel(), dtype=values.dtype).copy_(values.reshape(-1)).view(torch.uint8)


def raw(value: torch.Tensor) -> bytes:
    return flat(value).numpy().tobytes()


@pytest.mark.parametrize("attempt", range(12))
def test_changes_bring_every_byte_and_the_change_of_the_digest(attempt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORTH_NBYTES", 0)
    case = made(int(GENERATOR.integers(1, 30)))
    moved(case, 1.0)
    buckets = schedule(case.copies, 2048)
    forms, shared = forms_of(buckets), shared_pieces(buckets)
    kept = KeptBuckets(buckets, forms, case.manifest)
    mover = HostMover()
    buffers = mover.buffers(buckets, len(buckets))
    loadings = [Loading(bucket, case.source, buffer, mover) for bucket, buffer in zip(buckets, buffers, strict=True)]
    counts = counted(buckets, forms, case.manifest)
    assert counts is not None
    changings = [
        Changing(bucket, form, case.target, count, each)
        for bucket, form, count, each in zip(buckets, forms, counts, shared, strict=True)
    ]
    landings = Layout(placements=tuple(map(landing_of, case.copies)), storage_nbytes=(case.target.nbytes,))
    digest = LayoutDigest(case.manifest, landings)

    def fresh(bucket: int) -> Callable[[], list[np.ndarray[tuple[int], np.dtype[np.uint8]]]]:
        def values() -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
            loadings[bucket].run(Deadline(10))
            return loadings[bucket].values()

        return values

    for bucket in range(len(buckets)):
        assert kept.take(bucket, 1, fresh(bucket)) is None
    for value, copy in zip(expected(case), case.copies, strict=True):
        view(case.target, copy, "dst").copy_(value)
    kept.learn(1, digest.of(case.target))
    beside = _beside(case)
    for number in range(2, 6):
        moved(case, float(GENERATOR.choice([0.0, 0.05, 0.5])))
        before, sums = digest.of(case.target), []
        for bucket, changing in enumerate(changings):
            change = kept.take(bucket, number, fresh(bucket))
            assert change is not None
            sums.append(_applied(changing, change, kept.image(bucket), buckets[bucket], case))
        for value, copy in zip(expected(case), case.copies, strict=True):
            assert raw(view(case.target, copy, "dst")) == raw(value), copy
        assert digest.of(case.target) == kept.digest(number)
        known = [change for change in sums if change is not None]
        if len(known) == len(sums):
            assert digest.of(case.target) == (before + sum(known)) & MASK
        else:
            assert any(shared)  # parts of one transposed tensor, which lie between each other
        assert _beside(case) == beside


def _applied(changing: Changing, change: Change, image: memoryview, bucket: Bucket, case: Case) -> int | None:
    kind, data = told(change, change.last, bucket.nbytes) or (VALUES, b"")
    if kind != VALUES:
        assert kind in (CHANGES, CHECKED)
        sums = changing.apply([changing.read(Told.of(kind, data))], lambda work: _call(work))
    else:  # no shorter than the values
        values = Memory([torch.from_numpy(np.array(image))])
        for copy in map(out_of_bucket, bucket.pieces):
            view(case.target, copy, "dst").copy_(view(values, copy, "src"))
        sums = change.sums
    return None if sums is None else sums.change


def _call(work: Callable[[], object]) -> None:
    work()


def _beside(case: Case) -> bytes:
    """All bytes of the target that are nobody's."""
    copy_of = Memory([case.target.storages[0].clone()])
    for copy in case.copies:
        view(copy_of, copy, "dst").copy_(torch.zeros(copy.sizes, dtype=dtype_of(copy.dst_dtype)))
    return raw(copy_of.storages[0])
