"""Swaps and copies of runs: exact bytes, nothing outside touched, any address and length."""

from __future__ import annotations

import random

import pytest
import torch

from weightcast.errors import InvalidInput
from weightcast.receiver.swap import Swap

pytest.importorskip("triton", reason="needs a CUDA build of torch")

NBYTES = 8 * 2**20


def random_bytes(nbytes: int = NBYTES) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def random_spans(seed: int) -> list[tuple[int, int, int]]:
    """(start in a, start in b, bytes) that overlap nowhere."""
    rng, spans, a, b = random.Random(seed), [], 0, 0
    while True:
        nbytes = rng.choice([0, 1, 7, 8, 16, 100, 4096, 65_536, 65_537, 200_000])
        a, b = a + rng.choice([0, 0, 3, 16]), b + rng.choice([0, 0, 5, 16])
        if max(a, b) + nbytes > NBYTES:
            return spans
        spans.append((a, b, nbytes))
        a, b = a + nbytes, b + nbytes
        if rng.random() < 0.5:
            a, b = -(-a // 16) * 16, -(-b // 16) * 16


def check_swap(a: torch.Tensor, b: torch.Tensor) -> None:
    spans = random_spans(random.SystemRandom().getrandbits(32))
    expected_a, expected_b = a.cpu().clone(), b.cpu().clone()
    before = expected_a.clone(), expected_b.clone()
    for i, j, n in spans:
        expected_a[i : i + n], expected_b[j : j + n] = before[1][j : j + n], before[0][i : i + n]
    swap = Swap([(a[i : i + n], b[j : j + n]) for i, j, n in spans])
    assert swap.run() == swap.nbytes == sum(n for _, _, n in spans)
    torch.cuda.synchronize()
    assert torch.equal(a.cpu(), expected_a)
    assert torch.equal(b.cpu(), expected_b)
    swap.run()
    torch.cuda.synchronize()
    assert torch.equal(a.cpu(), before[0])
    assert torch.equal(b.cpu(), before[1])


def test_both_on_one_gpu() -> None:
    check_swap(random_bytes().cuda(), random_bytes().cuda())


def test_gpu_and_page_locked_host_in_either_order() -> None:
    check_swap(random_bytes().cuda(), random_bytes().pin_memory())
    check_swap(random_bytes().pin_memory(), random_bytes().cuda())


def test_work_queued_before_and_after_is_ordered() -> None:
    live, host = torch.empty(NBYTES, dtype=torch.uint8, device="cuda"), random_bytes().pin_memory()
    swap = Swap([(live, host)])
    for fresh in (random_bytes(), random_bytes()):
        was = host.clone()
        live.copy_(fresh.cuda())
        swap.run()
        seen = live.clone()
        torch.cuda.synchronize()
        assert torch.equal(seen.cpu(), was)
        assert torch.equal(host, fresh)


def test_overlap_and_pageable_memory_are_refused() -> None:
    data = random_bytes().cuda()
    with pytest.raises(InvalidInput, match="overlap"):
        Swap([(data[:100], data[50:150])]).run()
    with pytest.raises(InvalidInput, match="page-locked"):
        Swap([(data, random_bytes())]).run()


def test_copies_of_runs_touch_nothing_else() -> None:
    from weightcast.cuda.runs import CopyRuns

    spans = random_spans(random.SystemRandom().getrandbits(32))
    src, dst = random_bytes(), random_bytes()
    on_gpu, target = src.cuda(), dst.cuda()
    runs = CopyRuns([(on_gpu.data_ptr() + i, target.data_ptr() + j, n) for i, j, n in spans], target.device)
    assert runs.run() == sum(n for _, _, n in spans)
    for i, j, n in spans:
        dst[j : j + n] = src[i : i + n]
    assert torch.equal(target.cpu(), dst)
