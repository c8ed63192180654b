"""What transports are tested with: models with awkward layouts, and an oracle that knows what must arrive.

The oracle works on single elements and shares no code with the copies of the package.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightcast.layout import Layout, Placement, Region
from weightcast.manifest import Manifest, TensorSpec, align
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of, itemsize_of
from weightcast.plan import Copy, compile_plan
from weightcast.plan.replay import CPU_BLOCK_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCase:
    """The copies of one pair, and the sizes of both sides' storages."""

    copies: tuple[Copy, ...]
    src_nbytes: tuple[int, ...]
    dst_nbytes: tuple[int, ...]

    def new_values(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Return fresh random bytes for all source storages. Any bit pattern may come, except where a cast or a bool limits the values."""
        storages = [_random_bytes(nbytes, generator) for nbytes in self.src_nbytes]
        for copy in self.copies:
            if copy.src_dtype == "bool":
                _limit_to_bool(storages, copy)
            elif not copy.is_plain:
                _put_finite(storages, copy, generator)
        return storages

    def new_canary(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Return random bytes for the destination storages. Those outside of the destination's elements have to survive."""
        return [_random_bytes(nbytes, generator) for nbytes in self.dst_nbytes]

    def expected(self, values: Sequence[torch.Tensor], canary: Sequence[torch.Tensor]) -> list[bytes]:
        """Return the destination storages after one receive."""
        storages = [storage.clone() for storage in canary]
        for copy in self.copies:
            source = _gather(values[copy.src_storage], copy.src_dtype, copy.src_offset, copy.sizes, copy.src_strides)
            if not copy.is_plain:
                numbers = source.reshape(-1).view(dtype_of(copy.src_dtype))
                for dtype in filter(None, (copy.via, copy.dst_dtype)):
                    numbers = numbers.to(dtype_of(dtype))
                source = numbers.view(torch.uint8).reshape(-1, itemsize_of(copy.dst_dtype))
            where = _byte_indices(copy.dst_dtype, copy.dst_offset, copy.sizes, copy.dst_strides)
            storages[copy.dst_storage][where.reshape(-1)] = source.reshape(-1)
        return [storage.numpy().tobytes() for storage in storages]


def dtype_case(rng: random.Random) -> TransportCase:
    """Every dtype, with a scalar, an empty tensor, a vector and a matrix of each."""
    shapes: list[tuple[int, ...]] = [(), (0, 3), (rng.randint(1, 70),), (rng.randint(2, 9), rng.randint(2, 40))]
    specs = [
        TensorSpec(name=f"{dtype}.{i}", dtype=dtype, shape=shape)
        for dtype in DTYPE_NAMES
        for i, shape in enumerate(shapes)
    ]
    rng.shuffle(specs)
    return _random_case(rng, specs, permute=False)


def strided_case(rng: random.Random) -> TransportCase:
    """Transposed, padded and sharded at both ends."""
    dtypes = ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool")
    specs = [
        TensorSpec(
            name=f"w{i}",
            dtype=rng.choice(dtypes),
            shape=tuple(rng.randint(1, 14) for _ in range(rng.randint(1, 4))),
        )
        for i in range(40)
    ]
    return _random_case(rng, specs, permute=True, shard=True)


def cast_case(rng: random.Random) -> TransportCase:
    """A float32 trainer and an engine in bfloat16, with a few tensors that stay as they are."""
    specs = [
        TensorSpec(name=f"w{i}", dtype="float32", shape=(rng.randint(1, 30), rng.randint(1, 50))) for i in range(20)
    ]
    return _random_case(
        rng, specs, permute=True, shard=True, landing_dtype=lambda _: rng.choice(("bfloat16", "float32", "float16"))
    )


def published_case(rng: random.Random) -> TransportCase:
    """A trainer that publishes in another type than it holds, and an engine with types of its own. Some values are cast twice, also
    where both ends have one type. One tensor is larger than the block that a CPU casts at once."""
    types = ("float32", "bfloat16", "float16")
    shapes = [(rng.randint(1, 30), rng.randint(1, 50)) for _ in range(30)]
    specs = [TensorSpec(name=f"w{i}", dtype=rng.choice(types), shape=shape) for i, shape in enumerate(shapes)]
    large = CPU_BLOCK_NBYTES // itemsize_of("float32") // 50
    specs.append(TensorSpec(name="large", dtype="bfloat16", shape=(large + rng.randint(1, 99), 50)))

    def end_dtype(spec: TensorSpec) -> str:
        return "float32" if spec.name == "large" else rng.choice(types)

    return _random_case(rng, specs, permute=True, holding_dtype=end_dtype, landing_dtype=end_dtype)


def tiny_case(rng: random.Random) -> TransportCase:
    """Two thousand tensors of a few elements."""
    specs = [
        TensorSpec(name=f"t{i}", dtype=rng.choice(("float32", "bfloat16", "uint8")), shape=(rng.randint(0, 12),))
        for i in range(2000)
    ]
    return _random_case(rng, specs, permute=False)


def large_case(rng: random.Random) -> TransportCase:
    """Few tensors, each larger than a small bucket; one of them a single long row."""
    specs = [
        TensorSpec(name="row", dtype="bfloat16", shape=(1, rng.randint(60_000, 70_000))),
        TensorSpec(name="matrix", dtype="float32", shape=(rng.randint(100, 200), rng.randint(200, 300))),
        TensorSpec(name="cube", dtype="float8_e5m2", shape=(3, rng.randint(50, 80), rng.randint(100, 200))),
    ]
    return _random_case(rng, specs, permute=True)


def arena_case(rng: random.Random) -> TransportCase:
    """Whole tensors at multiples of 256 bytes in one storage at either side."""
    specs = [
        TensorSpec(
            name=f"t{i}", dtype=rng.choice(("float32", "bfloat16")), shape=(rng.randint(1, 9), rng.randint(1, 99))
        )
        for i in range(50)
    ]
    placements, end = [], 0
    for spec in specs:
        placements.append(
            Placement(
                region=Region.whole(spec),
                dtype=spec.dtype,
                storage=0,
                offset=end // itemsize_of(spec.dtype),
                strides=(spec.shape[1], 1),
            )
        )
        end = align(end + spec.nbytes)
    layout = Layout(placements=tuple(placements), storage_nbytes=(end,))
    return _case(Manifest.of(specs), layout, layout)


def bulk_case(nbytes: int) -> TransportCase:
    """One tensor of ``nbytes`` bytes: enough to be in the middle of it when something happens."""
    spec = TensorSpec(name="bulk", dtype="uint8", shape=(nbytes,))
    placement = Placement(region=Region.whole(spec), dtype="uint8", storage=0, offset=0, strides=(1,))
    layout = Layout(placements=(placement,), storage_nbytes=(nbytes,))
    return _case(Manifest.of([spec]), layout, layout)


CASES: dict[str, Callable[[random.Random], TransportCase]] = {
    "dtypes": dtype_case,
    "strided": strided_case,
    "casts": cast_case,
    "published": published_case,
    "tiny": tiny_case,
    "large": large_case,
}


def _case(manifest: Manifest, holdings: Layout, landings: Layout) -> TransportCase:
    plan = compile_plan(manifest, {0: holdings}, landings)
    copies = tuple(plan.get(0, ()))
    return TransportCase(copies=copies, src_nbytes=holdings.storage_nbytes, dst_nbytes=landings.storage_nbytes)


def _random_case(
    rng: random.Random,
    specs: Sequence[TensorSpec],
    *,
    permute: bool,
    shard: bool = False,
    holding_dtype: Callable[[TensorSpec], str] = lambda spec: spec.dtype,
    landing_dtype: Callable[[TensorSpec], str] = lambda spec: spec.dtype,
) -> TransportCase:
    manifest = Manifest.of(specs)
    held = [(Region.whole(spec), holding_dtype(spec)) for spec in specs]
    wanted = [(_box(rng, spec) if shard else Region.whole(spec), landing_dtype(spec)) for spec in specs]
    return _case(manifest, _random_layout(rng, held, permute), _random_layout(rng, wanted, permute))


def _box(rng: random.Random, spec: TensorSpec) -> Region:
    offsets, sizes = [], []
    for size in spec.shape:
        start = rng.randrange(size)
        offsets.append(start)
        sizes.append(rng.randint(1, size - start))
    return Region(name=spec.name, offsets=tuple(offsets), sizes=tuple(sizes))


def _random_layout(rng: random.Random, regions: Sequence[tuple[Region, str]], permute: bool) -> Layout:
    """Spread regions over three storages with random gaps; with ``permute`` also random dimension order and padding."""
    ends = [0, 0, 0]
    placements = []
    for region, dtype in regions:
        storage, itemsize = rng.randrange(len(ends)), itemsize_of(dtype)
        strides, extent = _random_strides(rng, region.sizes, permute)
        offset = -(-ends[storage] // itemsize) + rng.choice((0, 0, rng.randrange(40)))
        placements.append(Placement(region=region, dtype=dtype, storage=storage, offset=offset, strides=strides))
        ends[storage] = (offset + extent) * itemsize
    nbytes = tuple(end + rng.randrange(20) for end in ends)
    return Layout(placements=tuple(placements), storage_nbytes=nbytes)


def _random_strides(rng: random.Random, sizes: tuple[int, ...], permute: bool) -> tuple[tuple[int, ...], int]:
    """Strides without overlap and how many elements the box spans."""
    order = list(reversed(range(len(sizes))))
    if permute:
        rng.shuffle(order)
    strides, step = [0] * len(sizes), 1
    for dim in order:
        strides[dim] = step
        step *= max(sizes[dim], 1) + (rng.choice((0, 0, 1, 3)) if permute else 0)
    return tuple(strides), step


def _random_bytes(nbytes: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def _byte_indices(dtype: str, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Byte positions of a box's elements in row-major order: one row per element."""
    itemsize = itemsize_of(dtype)
    index = torch.tensor([offset])
    for size, stride in zip(sizes, strides, strict=True):
        index = (index.reshape(-1, 1) + torch.arange(size) * stride).reshape(-1)
    return index.reshape(-1, 1) * itemsize + torch.arange(itemsize)


def _gather(
    storage: torch.Tensor, dtype: str, offset: int, sizes: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    return storage[_byte_indices(dtype, offset, sizes, strides)]


def _put_finite(storages: Sequence[torch.Tensor], copy: Copy, generator: torch.Generator) -> None:
    """Normal numbers, infinities and zeros: how the bits of a NaN are cast is nobody's promise."""
    numbers = torch.randn(copy.region.numel, generator=generator) * 10.0
    specials = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    for i, special in itertools.islice(enumerate(specials), copy.region.numel // 4):
        numbers[i] = special
    where = _byte_indices(copy.src_dtype, copy.src_offset, copy.sizes, copy.src_strides)
    data = numbers.to(dtype_of(copy.src_dtype)).view(torch.uint8)
    storages[copy.src_storage][where.reshape(-1)] = data


def _limit_to_bool(storages: Sequence[torch.Tensor], copy: Copy) -> None:
    where = _byte_indices(copy.src_dtype, copy.src_offset, copy.sizes, copy.src_strides).reshape(-1)
    storages[copy.src_storage][where] &= 1
