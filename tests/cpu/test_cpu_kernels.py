"""Kernels on a CPU: copy and digest in one pass, and digests of whole layouts, against torch's operations."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightcast.cpu
import weightcast.digest
from weightcast.cpu import kernels, kernels_for, runs
from weightcast.cpu.proven import ProvenReplay
from weightcast.cpu.runs import Pieces
from weightcast.digest import LayoutDigest, digest_bytes
from weightcast.errors import DeadlineExceeded
from weightcast.layout import image_layout
from weightcast.manifest import Manifest, TensorSpec
from weightcast.memory import Memory
from weightcast.plan import Copy, compile_plan
from weightcast.testing.proven_suite import ProvenSuite


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
class TestProvenReplay(ProvenSuite):
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "PIECE_NBYTES", 8192)

    def compile(self, copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest) -> Callable[[], int]:
        return ProvenReplay(copies, src, dst, manifest, kernels).run


@settings(deadline=None, max_examples=60)
@given(nbytes=st.integers(1, 200_000), word=st.integers(0, 20_000), seed=st.integers(0, 2**32))
def test_any_range_has_the_digest_of_torchs_operations(nbytes: int, word: int, seed: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    target = torch.zeros(nbytes + 8, dtype=torch.uint8)
    expected = digest_bytes(data.clone(), word * 8)
    assert Pieces([(data.data_ptr(), word * 8, nbytes)], kernels.digest_ranges).run() == expected
    ranges = [(data.data_ptr(), target.data_ptr(), word * 8, nbytes)]
    assert Pieces(ranges, kernels.copy_and_digest_ranges).run() == expected
    assert torch.equal(target[:nbytes], data)
    assert not target[nbytes:].any()


def test_a_layout_has_one_digest_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(random.SystemRandom().getrandbits(32))
    specs = [
        TensorSpec(name=f"t{i}", dtype="bfloat16", shape=(rng.randint(1, 40), rng.randint(1, 99))) for i in range(40)
    ]
    manifest = Manifest.of(specs)
    layout = image_layout(manifest)
    memory = Memory([torch.randint(0, 256, (layout.storage_nbytes[0],), dtype=torch.uint8)])
    plain = LayoutDigest(manifest, layout).of(memory)
    monkeypatch.setattr(weightcast.cpu, "WORTH_NBYTES", 0)
    called = []
    digest_ranges = kernels.digest_ranges
    monkeypatch.setattr(kernels, "digest_ranges", lambda *columns: called.append(1) or digest_ranges(*columns))
    digest = LayoutDigest(manifest, layout)
    assert digest.of(memory) == plain
    assert called
    memory.storages[0][0] ^= 1
    assert digest.of(memory) != plain


def test_a_check_that_raises_ends_a_copy_between_two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PIECE_NBYTES", 2**15)
    monkeypatch.setattr(runs, "SLICE_NBYTES", 2**16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    spec = TensorSpec(name="w", dtype="uint8", shape=(2**18,))
    manifest = Manifest.of([spec])
    layout = image_layout(manifest)
    source = Memory([torch.randint(1, 256, (2**18,), dtype=torch.uint8)])
    target = Memory([torch.zeros(2**18, dtype=torch.uint8)])
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise DeadlineExceeded("over")

    proven = ProvenReplay(compile_plan(manifest, {0: layout}, layout)[0], source, target, manifest, kernels)
    with pytest.raises(DeadlineExceeded):
        proven.run(check)
    assert torch.equal(target.storages[0][: 2**17], source.storages[0][: 2**17])
    assert not target.storages[0][2**17 :].any()


@pytest.mark.parametrize("worth_nbytes", [0, 2**40], ids=["kernels", "torch"])
def test_a_check_that_raises_ends_a_digest_between_two_slices(
    monkeypatch: pytest.MonkeyPatch, worth_nbytes: int
) -> None:
    monkeypatch.setattr(weightcast.cpu, "WORTH_NBYTES", worth_nbytes)
    for module in (runs, weightcast.digest):
        monkeypatch.setattr(module, "SLICE_NBYTES", 2**16)
    monkeypatch.setattr(runs, "PIECE_NBYTES", 2**15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    manifest = Manifest.of([TensorSpec(name="w", dtype="uint8", shape=(2**18 + 9,))])
    layout = image_layout(manifest)
    memory = Memory([torch.randint(1, 256, (layout.storage_nbytes[0],), dtype=torch.uint8)])
    digest, calls = LayoutDigest(manifest, layout), []
    assert digest.of(memory, lambda: calls.append(1)) == digest_bytes(memory.storages[0][: 2**18 + 9], 0)
    assert len(calls) == 5

    def check() -> None:
        calls.append(1)
        if len(calls) == 8:
            raise DeadlineExceeded("over")

    with pytest.raises(DeadlineExceeded):
        digest.of(memory, check)
    assert len(calls) == 8


def test_without_numba_it_is_said_once_and_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "weightcast.cpu.kernels", None)
    monkeypatch.delattr(weightcast.cpu, "kernels")
    weightcast.cpu._kernels.cache_clear()
    try:
        with caplog.at_level(logging.INFO, logger="weightcast.cpu"):
            assert kernels_for(2**30) is None
            assert kernels_for(2**30) is None
        assert sum("weightcast[fast]" in record.message for record in caplog.records) == 1
    finally:
        weightcast.cpu._kernels.cache_clear()


def test_small_models_do_not_load_them() -> None:
    assert kernels_for(2**20) is None
    assert kernels_for(2**30) is kernels
