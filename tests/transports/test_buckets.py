"""Buckets: what the schedule promises, for random plans."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.errors import InvalidInput
from weightcast.layout import Layout, Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import dtype_of, itemsize_of
from weightcast.plan import compile_plan
from weightcast.plan.replay import Replay
from weightcast.testing.transport_cases import CASES
from weightcast.transports.buckets import Bucket, into_bucket, out_of_bucket, schedule


def through(bucket: Bucket, src: Memory, buffer: Memory, dst: Memory) -> None:
    """Pack a bucket's pieces, then unpack them."""
    Replay([into_bucket(piece) for piece in bucket.pieces], src, buffer).run()
    Replay([out_of_bucket(piece) for piece in bucket.pieces], buffer, dst).run()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(sorted(set(CASES) - {"tiny"})),
    units=st.sampled_from((1, 2, 3, 7, 64, 4096)),
)
def test_schedule_carries_every_element_once_in_aligned_pieces(seed: int, name: str, units: int) -> None:
    copies = CASES[name](random.Random(seed)).copies
    bucket_nbytes = 256 * units
    buckets = schedule(copies, bucket_nbytes)
    assert buckets == schedule(copies, bucket_nbytes)
    carried: dict[str, int] = {}
    for bucket in buckets:
        assert 0 < bucket.nbytes <= bucket_nbytes
        end = 0
        for piece in bucket.pieces:
            assert piece.offset % 256 == 0
            assert piece.offset >= end
            end = piece.offset + piece.nbytes
            carried[piece.copy.region.name] = carried.get(piece.copy.region.name, 0) + piece.copy.region.numel
        assert end == bucket.nbytes
    assert carried == {copy.region.name: copy.region.numel for copy in copies if copy.region.numel}


def test_buckets_are_filled() -> None:
    """Greedy: what begins a bucket would not have fitted in the one before."""
    copies = CASES["tiny"](random.Random(random.SystemRandom().getrandbits(32))).copies
    buckets = schedule(copies, 4096)
    for bucket, following in itertools.pairwise(buckets):
        assert -(-bucket.nbytes // 256) * 256 + following.pieces[0].nbytes > 4096


@pytest.mark.parametrize(
    ("held", "published", "landing", "travels"),
    [
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "float16", "float16"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "bfloat16"),
        ("float16", "float32", "float16", "float16"),
        ("float32", "float32", "float32", "float32"),
    ],
)
def test_the_narrower_of_published_and_landing_type_travels(
    held: str, published: str, landing: str, travels: str
) -> None:
    numel = 1000
    spec = TensorSpec(name="w", dtype=published, shape=(numel,))
    holdings, landings = (
        Layout(
            placements=(Placement(region=Region.whole(spec), dtype=dtype, storage=0, offset=0, strides=(1,)),),
            storage_nbytes=(numel * itemsize_of(dtype),),
        )
        for dtype in (held, landing)
    )
    (bucket,) = schedule(compile_plan(Manifest.of([spec]), {0: holdings}, landings)[0], 2**20)
    assert bucket.nbytes == numel * itemsize_of(travels)
    values = torch.randn(numel).to(dtype_of(held))
    buffer, target = (torch.zeros(numel * 4, dtype=torch.uint8) for _ in range(2))
    through(bucket, Memory([values.view(torch.uint8)]), Memory([buffer]), Memory([target]))
    expected = values.to(dtype_of(published)).to(dtype_of(landing))
    assert torch.equal(target[: expected.nbytes].view(expected.dtype), expected)


@pytest.mark.parametrize("name", ["strided", "casts", "published", "dtypes"])
def test_packed_and_unpacked_equals_the_oracle(name: str) -> None:
    seed = random.SystemRandom().getrandbits(32)
    case = CASES[name](random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    values, canary = case.new_values(generator), case.new_canary(generator)
    expected = case.expected(values, canary)
    src, dst = Memory(values), Memory(canary)
    buckets = schedule(case.copies, 1024)
    buffer = Memory([torch.empty(1024, dtype=torch.uint8)])
    for bucket in buckets:
        through(bucket, src, buffer, dst)
    assert [storage.numpy().tobytes() for storage in dst.storages] == expected, f"seed {seed}"


@pytest.mark.parametrize("bucket_nbytes", [0, -256, 255, 257, 1000])
def test_odd_bucket_sizes_are_refused(bucket_nbytes: int) -> None:
    with pytest.raises(InvalidInput, match=str(bucket_nbytes)):
        schedule((), bucket_nbytes)
