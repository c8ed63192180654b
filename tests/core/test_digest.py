"""Digests against a brute-force oracle in Python integers, over every dtype, strides and any cut into shards."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.content.layout_digest import LayoutDigest, digest_bytes, digest_tensor
from weightcast.digest.formula import BLOCK_WORDS, block_weights, combine, word_weights
from weightcast.layout import Layout, Placement, Region, contiguous_strides, image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


@functools.cache
def block_weight(block: int) -> int:
    return int(block_weights(torch.tensor([block]))[0])


def oracle(data: bytes, position: int) -> int:
    lead = position % 8
    padded = bytes(lead) + data + bytes(-(lead + len(data)) % 8)
    a = word_weights(torch.device("cpu")).tolist()
    total = 0
    for i in range(0, len(padded), 8):
        word = int.from_bytes(padded[i : i + 8], "little", signed=True)
        k = (position - lead + i) // 8
        total += block_weight(k // BLOCK_WORDS) * a[k % BLOCK_WORDS] * (word + 3 * (word >> 32))
    return total % 2**64


@settings(max_examples=60, deadline=None)
@given(nbytes=st.integers(0, 3000), position=st.integers(0, 2**40))
def test_equals_the_oracle_at_any_position(nbytes: int, position: int) -> None:
    data = random_bytes(nbytes)
    assert digest_bytes(data, position) == oracle(bytes(data.tolist()), position)


@pytest.mark.parametrize("nbytes", [32768 * 2 + 8, 2**19 + 32768 + 20])
@pytest.mark.parametrize("position", [0, 32760])
def test_equals_the_oracle_over_block_borders(nbytes: int, position: int) -> None:
    data = random_bytes(nbytes)
    assert digest_bytes(data, position) == oracle(bytes(data.tolist()), position)


@settings(max_examples=60, deadline=None)
@given(nbytes=st.integers(1, 5000), cut=st.floats(0, 1), position=st.integers(0, 10**6))
def test_adds_over_any_cut(nbytes: int, cut: float, position: int) -> None:
    data = random_bytes(nbytes)
    at = int(cut * nbytes)
    parts = digest_bytes(data[:at], position), digest_bytes(data[at:], position + at)
    assert combine(parts) == digest_bytes(data, position)


@settings(max_examples=80, deadline=None)
@given(nbytes=st.integers(1, 4000), data=st.data())
def test_any_change_of_one_byte_is_seen(nbytes: int, data: st.DataObject) -> None:
    old = random_bytes(nbytes)
    new = old.clone()
    at = data.draw(st.integers(0, nbytes - 1))
    new[at] ^= data.draw(st.integers(1, 255))
    assert digest_bytes(old, 0) != digest_bytes(new, 0)


def test_pairs_of_sign_flips_and_swaps_are_seen() -> None:
    values = torch.randn(4096, dtype=torch.float64)
    base = digest_tensor(values)
    for _ in range(50):
        i, j = torch.randperm(4096)[:2].tolist()
        flipped = values.clone()
        flipped[[i, j]] *= -1
        swapped = values.clone()
        swapped[[i, j]] = values[[j, i]]
        assert base not in (digest_tensor(flipped), digest_tensor(swapped))


def _values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bit patterns, NaN payloads included."""
    raw = random_bytes(math.prod(shape) * dtype.itemsize)
    return (raw & 1).view(torch.bool).view(shape) if dtype == torch.bool else raw.view(dtype).view(shape)


@pytest.mark.parametrize("name", [n for n in DTYPE_NAMES if not n.startswith("complex")])
def test_shards_along_any_dimension_prove_the_whole(name: str) -> None:
    shape = (6, 10, 7)
    spec = TensorSpec(name="w", dtype=name, shape=shape)
    manifest = Manifest.of([TensorSpec(name="before", dtype="uint8", shape=(300,)), spec])
    whole = _values(dtype_of(name), shape)
    expected = digest_tensor(whole, manifest.positions["w"])
    for dim in range(3):
        parts = []
        for start in range(0, shape[dim], 3):
            size = min(3, shape[dim] - start)
            shard = whole.narrow(dim, start, size)
            offsets = tuple(start if d == dim else 0 for d in range(3))
            rows = shard.clone(memory_format=torch.contiguous_format)
            columns = shard.transpose(0, 2).clone(memory_format=torch.contiguous_format).transpose(0, 2)
            for laid, is_row_major in ((rows, True), (columns, False)):
                sizes = tuple(shard.shape)
                placement = Placement(
                    region=Region(name="w", offsets=offsets, sizes=sizes),
                    dtype=name,
                    storage=0,
                    offset=0,
                    strides=contiguous_strides(sizes) if is_row_major else tuple(laid.stride()),
                )
                flat = torch.empty(0, dtype=torch.uint8).set_(laid.untyped_storage())
                layout = Layout(placements=(placement,), storage_nbytes=(flat.numel(),))
                value = LayoutDigest(manifest, layout).of(Memory([flat]))
                if is_row_major:
                    parts.append(value)
                assert value == parts[-1]
        assert combine(parts) == expected


def test_an_arena_is_one_run_and_equals_the_sum_of_its_tensors() -> None:
    specs = [TensorSpec(name=f"t{i}", dtype=DTYPE_NAMES[i % 5], shape=(i % 7, 3) if i % 4 else ()) for i in range(50)]
    manifest = Manifest.of(specs)
    layout = image_layout(manifest)
    arena = torch.zeros(manifest.image_nbytes, dtype=torch.uint8)
    memory = Memory([arena])
    total = 0
    for spec, placement in zip(manifest.tensors, layout.placements, strict=True):
        values = _values(dtype_of(spec.dtype), spec.shape)
        memory.view(0, spec.dtype, placement.offset, spec.shape, placement.strides).copy_(values)
        total += digest_tensor(values, manifest.positions[spec.name])
    compiled = LayoutDigest(manifest, layout, gaps_are_zero=True)
    assert compiled.of(memory) == total % 2**64
    assert len(compiled.runs) == 1
    assert LayoutDigest(manifest, layout).of(memory) == total % 2**64


def test_padding_is_crossed_only_to_the_start_of_a_tensor() -> None:
    """The second half of a small tensor is as near to the tensor before it as an arena's padding is long."""
    specs = [
        TensorSpec(name="before", dtype="float32", shape=(5, 4)),
        TensorSpec(name="cut", dtype="float32", shape=(32,)),
    ]
    manifest = Manifest.of(specs)
    layout = image_layout(manifest)
    memory = Memory([torch.zeros(manifest.image_nbytes, dtype=torch.uint8)], is_arena=True)
    values = {spec.name: torch.randn(spec.shape) for spec in specs}
    for spec, placement in zip(specs, layout.placements, strict=True):
        memory.view(0, spec.dtype, placement.offset, spec.shape, placement.strides).copy_(values[spec.name])
    before, cut = layout.placements
    for start in (0, 8, 16):
        half = Placement(
            region=Region(name="cut", offsets=(start,), sizes=(16,)), dtype="float32", storage=0, offset=cut.offset + start,
            strides=(1,),
        )  # fmt: skip
        held = Layout(placements=(before, half), storage_nbytes=layout.storage_nbytes)
        position = manifest.positions["cut"] + start * 4
        expected = combine(
            [digest_tensor(values["before"]), digest_tensor(values["cut"][start : start + 16], position)]
        )
        assert LayoutDigest(manifest, held, gaps_are_zero=True).of(memory) == expected


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPE_NAMES),
    at=st.integers(0, 200),
    bits=st.integers(0, 2**32),
    flip=st.integers(1, 2**32 - 1),
)
def test_one_changed_element_is_always_seen(dtype: str, at: int, bits: int, flip: int) -> None:
    size = dtype_of(dtype).itemsize
    if size > 4:
        return
    data = random_bytes(201 * size)
    element = data[at * size : (at + 1) * size]
    element.copy_(bytes_of(bits % 256**size, size))
    before = digest_bytes(data, 256)
    element.copy_(bytes_of((bits ^ flip) % 256**size, size))
    assert (digest_bytes(data, 256) == before) == (flip % 256**size == 0)


def bytes_of(value: int, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(value.to_bytes(size, "little")), dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    high=st.integers(0, 2),
    low=st.integers(0, 2**32 - 1),
    other=st.integers(0, 2**64 - 1),
    at=st.integers(0, 50),
)
def test_one_changed_word_is_seen_but_for_two_partners(high: int, low: int, other: int, at: int) -> None:
    """The exceptions that the description names, and no others among words of the same high half."""
    data = random_bytes(51 * 8)
    word = data[at * 8 : at * 8 + 8]

    def digest(value: int) -> int:
        word.copy_(bytes_of(value, 8))
        return digest_bytes(data, 0)

    given = ((0x80000000 + high) << 32) + low
    partners = {given}
    for d_high, d_low in ((2**32 - 3, 9), (2**32 - 2, 6 - 2**32)):
        other_high, other_low = high - 2**31 + d_high, low + d_low
        if other_high < 2**31 and 0 <= other_low < 2**32:
            partners.add((other_high << 32) + other_low)
    for partner in partners:
        assert digest(partner) == digest(given)
    assert (digest(given) == digest(other)) == (other in partners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_changed_signs_are_seen(dtype: torch.dtype, every: int) -> None:
    """Of all elements, or of some in each word: nothing but highest bits changes."""
    for positive in (torch.rand(64) + 0.5, torch.randn(64)):
        values = positive.to(dtype)
        for start in range(every):
            signs = torch.ones(64)
            signs[start::every] = -1
            assert digest_tensor(values) != digest_tensor((values.float() * signs).to(dtype))
