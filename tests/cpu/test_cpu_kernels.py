"""Kernels on a CPU: copy and digest in one pass, and digests of whole layouts, against torch's operations."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weightcast.cpu
import weightcast.cpu.digest
from weightcast.content.layout_digest import LayoutDigest, digest_bytes
from weightcast.content.proven_on_cpu import ProvenReplay
from weightcast.cpu import compared, kernels, kernels_for, runs
from weightcast.cpu.runs import Pieces
from weightcast.delta import differing_by_numpy
from weightcast.errors import DeadlineExceeded
from weightcast.layout import Layout, Placement, Region, image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
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
    for module in (runs, weightcast.cpu.digest):
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


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Manifest, Layout, Memory]:
    """A part of a tensor that lies by any strides in memory, behind another tensor in the image."""
    shape = (*draw(st.lists(st.integers(1, 9), max_size=2)), draw(st.sampled_from([*range(1, 10), 5000])))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "float64", "complex64"]))
    sizes = tuple(draw(st.integers(1, size)) for size in shape)
    offsets = tuple(draw(st.integers(0, size - part)) for size, part in zip(shape, sizes, strict=True))
    strides, step = [0] * len(sizes), draw(st.sampled_from([1, 1, 2]))
    for dim in draw(st.permutations(range(len(sizes)))):
        strides[dim] = step
        step = step * sizes[dim] + draw(st.sampled_from([0, 0, 1]))
    first = draw(st.integers(0, 9))
    region = Region(name="w", offsets=offsets, sizes=sizes)
    place = Placement(region=region, dtype=dtype, storage=0, offset=first, strides=tuple(strides))
    storage = torch.randint(0, 256, (place.end_nbytes,), dtype=torch.uint8)
    before = TensorSpec(name="before", dtype="uint8", shape=(draw(st.integers(1, 70_000)),))
    manifest = Manifest.of([before, TensorSpec(name="w", dtype=dtype, shape=shape)])
    return manifest, Layout(placements=(place,), storage_nbytes=(storage.numel(),)), Memory([storage])


@settings(deadline=None)
@given(boxes(), st.booleans(), st.sampled_from([1, 40, 2**20]), st.sampled_from([8, 512]))
def test_a_box_has_the_digest_of_its_bytes_in_the_image(
    box: tuple[Manifest, Layout, Memory], with_kernels: bool, part_nbytes: int, min_row_nbytes: int
) -> None:
    manifest, layout, memory = box
    place = layout.placements[0]
    values = memory.view(0, place.dtype, place.offset, place.region.sizes, place.strides)
    whole = torch.zeros(manifest["w"].shape, dtype=values.dtype)
    part = whole
    for dim, (start, size) in enumerate(zip(place.region.offsets, place.region.sizes, strict=True)):
        part = part.narrow(dim, start, size)
    part.copy_(values)
    expected = digest_bytes(whole.reshape(-1).view(torch.uint8), manifest.positions["w"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weightcast.cpu, "WORTH_NBYTES", 0 if with_kernels else 2**40)
        for name, nbytes in (("KERNEL_PART", part_nbytes), ("TORCH_PART", part_nbytes), ("MIN_ROW", min_row_nbytes)):
            patch.setattr(weightcast.cpu.digest, f"{name}_NBYTES", nbytes)
        assert LayoutDigest(manifest, layout).of(memory) == expected


@pytest.mark.parametrize("worth_nbytes", [0, 2**40], ids=["kernels", "torch"])
@pytest.mark.parametrize("strides", [(256, 1), (1, 512)], ids=["rows", "elements"])
def test_a_check_that_raises_ends_the_digest_of_a_box(
    monkeypatch: pytest.MonkeyPatch, worth_nbytes: int, strides: tuple[int, int]
) -> None:
    monkeypatch.setattr(weightcast.cpu, "WORTH_NBYTES", worth_nbytes)
    monkeypatch.setattr(runs, "SLICE_NBYTES", 2**15)
    for name in ("KERNEL_PART_NBYTES", "TORCH_PART_NBYTES"):
        monkeypatch.setattr(weightcast.cpu.digest, name, 2**15)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    manifest = Manifest.of([TensorSpec(name="w", dtype="float32", shape=(512, 512))])
    region = Region(name="w", offsets=(0, 256), sizes=(512, 256))
    place = Placement(region=region, dtype="float32", storage=0, offset=0, strides=strides)
    memory = Memory([torch.randint(0, 256, (place.end_nbytes,), dtype=torch.uint8)])
    digest, calls = LayoutDigest(manifest, Layout(placements=(place,), storage_nbytes=(memory.nbytes,))), []
    digest.of(memory, lambda: calls.append(1))
    assert len(calls) == 16
    with pytest.raises(DeadlineExceeded):
        digest.of(memory, lambda: _raise(DeadlineExceeded("over")))


def _raise(error: Exception) -> None:
    raise error


def test_the_digest_of_a_box_takes_little_memory_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once took forty times what it read."""
    manifest = Manifest.of([TensorSpec(name="w", dtype="bfloat16", shape=(2048, 2048))])
    region = Region(name="w", offsets=(0, 0), sizes=(2048, 1024))
    place = Placement(region=region, dtype="bfloat16", storage=0, offset=0, strides=(1024, 1))
    memory = Memory([torch.randint(0, 256, (place.end_nbytes,), dtype=torch.uint8)])
    for worth_nbytes in (0, 2**40):
        monkeypatch.setattr(weightcast.cpu, "WORTH_NBYTES", worth_nbytes)
        digest = LayoutDigest(manifest, Layout(placements=(place,), storage_nbytes=(memory.nbytes,)))
        digest.of(memory)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            digest.of(memory)
        events = [event.cpu_memory_usage for event in profile.key_averages() if event.cpu_memory_usage > 0]
        largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
        assert events or worth_nbytes == 0
        assert largest < memory.nbytes / 2


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_the_kernel_finds_the_changes_that_numpy_finds(itemsize: int, share: float) -> None:
    rng = np.random.default_rng()
    for numel in (0, 1, 7, 4097):
        # At an address that is a multiple of an element only, as values lie in the memory of a trainer.
        whole = rng.integers(0, 256, (numel + 1) * itemsize, np.uint8)
        old, new = whole[itemsize:].copy(), whole.copy()[itemsize:]
        changed = np.flatnonzero(rng.random(numel) < share)
        new[changed * itemsize + rng.integers(0, itemsize, len(changed))] ^= 0x80
        found = compared.differing(old, new, itemsize)
        assert found.tolist() == changed.tolist() == differing_by_numpy(old, new, itemsize).tolist()
