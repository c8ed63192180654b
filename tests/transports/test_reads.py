"""Reads: what a worker reads of the trainer's memory, and the copies out of what it read."""

from __future__ import annotations

import random

import pytest
import torch

from weightcast.layout import Layout, Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy, compile_plan
from weightcast.plan.replay import Replay
from weightcast.testing.transport_cases import CASES, arena_case
from weightcast.transports.reads import read_buckets


@pytest.fixture
def rng() -> random.Random:
    return random.Random(random.SystemRandom().getrandbits(32))


def _play(copies: tuple[Copy, ...], values: list[torch.Tensor], target: Memory, bucket_nbytes: int) -> list[int]:
    """Read every bucket into a buffer of random bytes, and copy out of it. Returns the number of ranges of each."""
    numbers = []
    for bucket in read_buckets(copies, bucket_nbytes):
        buffer = torch.randint(0, 256, (bucket.nbytes,), dtype=torch.uint8)
        for r in bucket.ranges:
            assert 0 <= r.start <= r.start + r.nbytes <= values[r.storage].numel()
            assert r.place + r.nbytes <= bucket.nbytes
            buffer[r.place : r.place + r.nbytes] = values[r.storage][r.start : r.start + r.nbytes]
        Replay(bucket.copies, Memory([buffer]), target).run()
        numbers.append(len(bucket.ranges))
    return numbers


@pytest.mark.parametrize("bucket_nbytes", [256, 4096, 2**20])
@pytest.mark.parametrize("name", list(CASES))
def test_what_lands_is_what_a_replay_lands(name: str, bucket_nbytes: int, rng: random.Random) -> None:
    case = CASES[name](rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    for _ in range(2):
        values, canary = case.new_values(generator), case.new_canary(generator)
        target = Memory([storage.clone() for storage in canary])
        _play(case.copies, values, target, bucket_nbytes)
        assert [storage.numpy().tobytes() for storage in target.storages] == case.expected(values, canary)


def test_tensors_that_lie_side_by_side_are_one_range(rng: random.Random) -> None:
    case = arena_case(rng)
    values, canary = (make(torch.Generator().manual_seed(1)) for make in (case.new_values, case.new_canary))
    assert _play(case.copies, values, Memory(canary), 2**24) == [1]


def _one(shape: tuple[int, int], taken: tuple[slice, slice], strides: tuple[int, int]) -> tuple[Copy, ...]:
    spec = TensorSpec(name="w", dtype="bfloat16", shape=shape)
    offsets = tuple(part.start for part in taken)
    sizes = tuple(part.stop - part.start for part in taken)
    held = Placement(region=Region.whole(spec), dtype=spec.dtype, storage=0, offset=0, strides=strides)
    wanted = Placement(
        region=Region(name="w", offsets=offsets, sizes=sizes),
        dtype=spec.dtype,
        storage=0,
        offset=0,
        strides=(sizes[1], 1),
    )
    nbytes = shape[0] * shape[1] * 2
    holdings = Layout(placements=(held,), storage_nbytes=(nbytes,))
    landings = Layout(placements=(wanted,), storage_nbytes=(sizes[0] * sizes[1] * 2,))
    return tuple(compile_plan(Manifest.of([spec]), {0: holdings}, landings)[0])


@pytest.mark.parametrize(
    ("shape", "columns", "strides", "ranges", "nbytes"),
    [
        ((64, 8192), slice(0, 1024), (8192, 1), 64, 64 * 2048),  # an eighth of long rows: row by row
        ((64, 512), slice(128, 256), (512, 1), 1, (63 * 512 + 128) * 2),  # a part of short rows: with what is between
        ((64, 512), slice(0, 512), (1, 64), 1, 64 * 512 * 2),  # transposed: in the order in which it lies
    ],
)
def test_rows_are_read_one_by_one_or_with_what_is_between(
    shape: tuple[int, int], columns: slice, strides: tuple[int, int], ranges: int, nbytes: int
) -> None:
    copies = _one(shape, (slice(0, shape[0]), columns), strides)
    (bucket,) = read_buckets(copies, 2**24)
    assert (len(bucket.ranges), sum(r.nbytes for r in bucket.ranges)) == (ranges, nbytes)
    values = torch.randint(0, 256, (shape[0] * shape[1] * 2,), dtype=torch.uint8)
    target = Memory([torch.zeros(shape[0] * (columns.stop - columns.start) * 2, dtype=torch.uint8)])
    for bucket_nbytes in (2**24, 4096, 512):
        target.storages[0].zero_()
        _play(copies, [values], target, bucket_nbytes)
        expected = values.view(torch.int16).as_strided(shape, strides)[:, columns]
        assert torch.equal(target.storages[0].view(torch.int16).view(expected.shape), expected)
