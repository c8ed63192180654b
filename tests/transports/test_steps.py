"""Steps: what a group of workers is sent, and that every worker finds exactly its own bytes in it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.errors import InvalidInput, ProtocolError
from weightcast.memory import Memory
from weightcast.plan import Copy
from weightcast.replay import Replay
from weightcast.testing.transport_cases import CASES, TransportCase
from weightcast.transports.buckets import into_bucket, unpacker
from weightcast.transports.steps import Share, Step, divide, receive_buckets

NAMES = sorted(set(CASES) - {"tiny"})


def parts_of(case: TransportCase, num_workers: int, rng: random.Random) -> list[list[Copy]]:
    """What each worker wants: some copies are everybody's, some only a few workers', and everybody has an order of its own."""
    shared = rng.random()
    parts: list[list[Copy]] = [[] for _ in range(num_workers)]
    for copy in case.copies:
        wanted_by = (
            range(num_workers) if rng.random() < shared else rng.sample(range(num_workers), rng.randint(1, num_workers))
        )
        for worker in wanted_by:
            parts[worker].append(copy)
    for part in parts[1:]:
        rng.shuffle(part)
    return parts


def sent(step: Step, memory: Memory, part_nbytes: int) -> dict[int, torch.Tensor]:
    """The buffers of a step, by worker; -1 stands for all."""
    buckets = {-1: step.for_all} if step.for_all is not None else step.own
    buffers = {}
    for worker, bucket in buckets.items():
        buffers[worker] = torch.randint(0, 256, (bucket.nbytes,), dtype=torch.uint8)
        Replay([into_bucket(piece) for piece in bucket.pieces], memory, Memory([buffers[worker]])).run()
        assert step.for_all is not None or bucket.nbytes <= part_nbytes
    return buffers


def deliver(
    steps: Sequence[Step], shares: Sequence[Share], parts: Sequence[Sequence[Copy]], src: Memory, dst: Sequence[Memory]
) -> None:
    received = [receive_buckets(copies, share) for copies, share in zip(parts, shares, strict=True)]
    at = [0] * len(parts)
    for step in steps:
        for worker, buffer in sent(step, src, shares[0].part_nbytes).items():
            for to in range(len(parts)) if worker < 0 else [worker]:
                buckets, num_common = received[to]
                assert (at[to] < num_common) == (worker < 0)
                unpacker(buckets[at[to]], buffer, dst[to]).run()
                at[to] += 1
    assert at == [len(buckets) for buckets, _ in received]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(NAMES),
    num_workers=st.integers(1, 5),
    units=st.sampled_from((1, 2, 5, 16, 4096)),
)
def test_every_worker_gets_its_own_bytes(seed: int, name: str, num_workers: int, units: int) -> None:
    rng = random.Random(seed)
    case = CASES[name](rng)
    parts = parts_of(case, num_workers, rng)
    generator = torch.Generator().manual_seed(seed)
    values = case.new_values(generator)
    canaries = [case.new_canary(generator) for _ in parts]
    expected = [
        TransportCase(copies=tuple(part), src_nbytes=case.src_nbytes, dst_nbytes=case.dst_nbytes).expected(
            values, canary
        )
        for part, canary in zip(parts, canaries, strict=True)
    ]
    steps, shares = divide(parts, 256 * units)
    deliver(steps, shares, parts, Memory(values), [Memory(canary) for canary in canaries])
    assert [[storage.numpy().tobytes() for storage in canary] for canary in canaries] == expected


def test_what_all_want_travels_once() -> None:
    case = CASES["strided"](random.Random(random.SystemRandom().getrandbits(32)))
    nbytes = sum(copy.nbytes for copy in case.copies)
    alone, _ = divide([case.copies], 2**20)
    steps, shares = divide([case.copies] * 7, 2**20)
    assert steps == alone
    assert all(step.for_all is not None for step in steps)
    assert sum(piece.copy.nbytes for step in steps if step.for_all for piece in step.for_all.pieces) == nbytes
    assert len(set(shares)) == 1


def test_what_nobody_else_wants_travels_side_by_side() -> None:
    """Shards: every step has a part of every worker, and they fit into one bucket together."""
    case = CASES["strided"](random.Random(random.SystemRandom().getrandbits(32)))
    parts = [case.copies[at::3] for at in range(3)]
    steps, shares = divide(parts, 3 * 1024)
    assert all(step.for_all is None for step in steps)
    assert set(steps[0].own) == {0, 1, 2}
    assert all(step.nbytes <= 3 * 1024 for step in steps)
    assert {share.part_nbytes for share in shares} == {1024}


def test_a_tensor_that_lands_twice_travels_twice_and_only_what_all_have_twice_is_common() -> None:
    case = CASES["tiny"](random.Random(random.SystemRandom().getrandbits(32)))
    copy = next(copy for copy in case.copies if copy.nbytes)
    _, shares = divide([[copy, copy], [copy]], 4096)
    assert [share.common for share in shares] == [(0,), (0,)]
    _, shares = divide([[copy, copy], [copy, copy]], 4096)
    assert [share.common for share in shares] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"common": (0, 0)},
        {"common": (10**6,)},
        {"common": (-1,)},
        {"nbytes": (1,)},
        {"part_nbytes": 100},
        {"bucket_nbytes": 0},
    ],
)
def test_a_share_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    case = CASES["strided"](random.Random(random.SystemRandom().getrandbits(32)))
    _, (share,) = divide([case.copies], 4096)
    with pytest.raises((ProtocolError, InvalidInput)):
        receive_buckets(case.copies, msgspec.structs.replace(share, **change))
