"""The digest on a GPU equals the one on the CPU, for any run, any box and any memory address."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch

from weightcast.content.layout_digest import LayoutDigest, digest_bytes, digest_tensor
from weightcast.layout import Layout, Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of, name_of
from weightcast.testing.transport_cases import CASES

pytest.importorskip("triton", reason="needs a CUDA build of torch")


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(random.SystemRandom().getrandbits(32))


def test_runs_at_any_address_position_and_length(rng: random.Random) -> None:
    from weightcast.cuda.digest import RunDigest
    from weightcast.digest.regions import DigestRun

    data = random_bytes(64 * 2**20)
    runs, at = [], rng.randrange(20)
    while at < data.numel():
        nbytes = min(rng.choice([0, 1, 3, 8, 16, 255, 4096, 8200, 140_000, 3_000_000]), data.numel() - at)
        position = rng.choice([0, rng.randrange(2**40), rng.randrange(2**20) * 8, rng.randrange(2**12) * 131072])
        runs.append(DigestRun(0, at, position, nbytes))
        at += nbytes + rng.choice([0, 1, 5, 256])
    expected = [digest_bytes(data[run.offset : run.offset + run.nbytes].clone(), run.position) for run in runs]
    digest = RunDigest(runs, [data.cuda()])
    assert digest.each() == expected
    assert digest.total() == sum(expected) % 2**64


def test_one_large_run_beyond_four_gibibytes() -> None:
    values = torch.randint(-(2**62), 2**62, (2**29 + 12_345,), device="cuda")
    data = values.view(torch.uint8)
    position = 3 * 32768
    parts = sum(digest_bytes(data[i : i + 2**30].cpu(), position + i) for i in range(0, data.numel(), 2**30))
    assert digest_bytes(data, position) == parts % 2**64


def test_single_tensors_of_every_alignment(rng: random.Random) -> None:
    for _ in range(40):
        data, start = random_bytes(5000), rng.randrange(64)
        part, position = data[start : start + rng.randrange(4000)], rng.randrange(2**40)
        assert digest_bytes(part.cuda(), position) == digest_bytes(part, position)
        assert digest_bytes(data.cuda()[start : start + part.numel()], position) == digest_bytes(part, position)
    matrix = torch.randn(300, 70)
    assert digest_tensor(matrix.cuda().t()) == digest_tensor(matrix.t())


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_dtype_of_any_size_and_offset(name: str, rng: random.Random) -> None:
    dtype = dtype_of(name)
    for _ in range(8):
        numel, start = rng.randrange(40_000), rng.randrange(200)
        raw = random_bytes((start + numel + 1) * dtype.itemsize)
        if dtype == torch.bool:
            raw &= 1
        values, on_gpu = raw.view(dtype), raw.cuda().view(dtype)
        position = rng.choice([0, rng.randrange(2**40), rng.randrange(2**20) * 32768])
        assert digest_tensor(on_gpu[start:], position) == digest_tensor(values[start:], position)
        assert digest_tensor(on_gpu[start], position) == digest_tensor(values[start], position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_negated_tensor_has_another_digest(dtype: torch.dtype, rng: random.Random) -> None:
    """All values positive, then all negative: of every element nothing but the highest bit changes."""
    for numel in (1, 2, 4096, 16_384, rng.randrange(3, 16_384), rng.randrange(16_384, 1_000_000)):
        values = (torch.rand(numel) + 0.5).to(dtype)
        position = rng.choice([0, rng.randrange(2**37) * 8])
        expected = [digest_tensor(each, position) for each in (values, -values)]
        on_gpu = values.cuda()
        assert [digest_tensor(each, position) for each in (on_gpu, -on_gpu)] == expected
        assert expected[0] != expected[1]
    matrix = (torch.rand(rng.randrange(1, 200), rng.randrange(1, 200)) + 0.5).to(dtype)
    transposed = [digest_of_transposed(each) for each in (matrix, -matrix)]
    assert transposed == [digest_tensor(each) for each in (matrix, -matrix)]
    assert transposed[0] != transposed[1]


def digest_of_transposed(matrix: torch.Tensor) -> int:
    """Digest of a matrix that lies on the GPU column by column."""
    spec = TensorSpec(name="w", dtype=name_of(matrix.dtype), shape=tuple(matrix.shape))
    placement = Placement(
        region=Region.whole(spec), dtype=spec.dtype, storage=0, offset=0, strides=(1, matrix.shape[0])
    )
    layout = Layout(placements=(placement,), storage_nbytes=(spec.nbytes,))
    held = matrix.t().contiguous().view(-1).view(torch.uint8)
    return LayoutDigest(Manifest.of([spec]), layout).of(Memory([held.cuda()]))


@pytest.mark.parametrize("case_name", list(CASES))
def test_layouts_with_strides_shards_and_every_dtype(case_name: str, rng: random.Random) -> None:
    case = CASES[case_name](rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    storages = case.new_canary(generator)
    specs: dict[str, TensorSpec] = {}
    # The CPU's digest refuses strided complex values, and reading a bool of any other byte than 0 and 1 changes it.
    stand_in = {"complex64": "float64", "bool": "uint8"}
    copies = [msgspec.structs.replace(c, dst_dtype=stand_in.get(c.dst_dtype, c.dst_dtype)) for c in case.copies]
    for copy in copies:
        shape = tuple(o + s + 3 for o, s in zip(copy.region.offsets, copy.sizes, strict=True))
        specs[copy.region.name] = TensorSpec(name=copy.region.name, dtype=copy.dst_dtype, shape=shape)
    placements = tuple(
        Placement(
            region=copy.region,
            dtype=copy.dst_dtype,
            storage=copy.dst_storage,
            offset=copy.dst_offset,
            strides=copy.dst_strides,
        )
        for copy in copies
    )
    digest = LayoutDigest(Manifest.of(specs.values()), Layout(placements=placements, storage_nbytes=case.dst_nbytes))
    on_gpu = Memory([storage.cuda() for storage in storages])
    assert digest.of(on_gpu) == digest.of(Memory(storages))


def test_column_shards_and_a_transposed_holding() -> None:
    spec = TensorSpec(name="w", dtype="bfloat16", shape=(96, 4096))
    whole = torch.randn(96, 4096).to(torch.bfloat16)
    manifest = Manifest.of([spec])
    total = 0
    for shard, part in enumerate(whole.chunk(4, dim=1)):
        memory = part.contiguous() if shard % 2 else part.t().contiguous()
        strides = (1024, 1) if shard % 2 else (1, 96)
        region = Region(name="w", offsets=(0, shard * 1024), sizes=(96, 1024))
        placement = Placement(region=region, dtype="bfloat16", storage=0, offset=0, strides=strides)
        layout = Layout(placements=(placement,), storage_nbytes=(96 * 1024 * 2,))
        total += LayoutDigest(manifest, layout).of(Memory([memory.cuda().view(torch.uint8).view(-1)]))
    assert total % 2**64 == digest_tensor(whole)


def test_a_changed_byte_is_named_by_its_run(rng: random.Random) -> None:
    from weightcast.cuda.digest import RunDigest
    from weightcast.digest.regions import DigestRun

    data = random_bytes(100_000).cuda()
    runs = [DigestRun(0, i * 1000, i * 1024, 1000) for i in range(100)]
    digest = RunDigest(runs, [data])
    before = digest.each()
    at = rng.randrange(100_000)
    data[at] ^= 1 << rng.randrange(8)
    after = digest.each()
    assert [i for i in range(100) if before[i] != after[i]] == [at // 1000]
