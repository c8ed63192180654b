"""Copy and digest in one pass: the bytes of a plain replay, and the digest that a second look gives."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch

from weightcast.digest import LayoutDigest
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.manifest import Manifest, TensorSpec
from weightcast.memory import Memory
from weightcast.plan import Copy, compile_plan
from weightcast.replay import Replay
from weightcast.testing.transport_cases import CASES

pytest.importorskip("triton", reason="needs a CUDA build of torch")


@pytest.fixture
def rng() -> random.Random:
    return random.Random(random.SystemRandom().getrandbits(32))


def random_storages(sizes: list[int]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]


def check(copies: tuple[Copy, ...], manifest: Manifest, src: list[torch.Tensor], dst: list[torch.Tensor]) -> None:
    """Twice, with other values the second time; what is around the destinations stays."""
    from weightcast.cuda.proven import ProvenReplay, landing_of

    on_gpu, target = Memory([s.cuda() for s in src]), Memory([d.cuda() for d in dst])
    expected = Memory([d.clone() for d in dst])
    proven = ProvenReplay(copies, on_gpu, target, manifest, torch.device("cuda", 0))
    landings = Layout(placements=tuple(map(landing_of, copies)), storage_nbytes=tuple(d.numel() for d in dst))
    for _ in range(2):
        for storage, values in zip(on_gpu.storages, src, strict=True):
            values.copy_(torch.randint(0, 2, values.shape, dtype=torch.uint8) * values)
            storage.copy_(values)
        Replay(copies, Memory(src), expected).run()
        assert proven.run() == sum(copy.nbytes for copy in copies)
        torch.cuda.synchronize()
        for got, wanted in zip(target.storages, expected.storages, strict=True):
            assert torch.equal(got.cpu(), wanted)
        assert proven.total() == LayoutDigest(manifest, landings).of(target)


def test_fused_parameters_of_odd_sizes(rng: random.Random) -> None:
    """Tensors one by one at the trainer, side by side in the engine, at word borders and at others."""
    specs, held, wanted, end = [], [], [], 0
    for number in range(60):
        dtype = rng.choice(["bfloat16", "float32", "float8_e4m3fn", "int64"])
        shape = rng.choice([(rng.randint(1, 9),), (rng.randint(1, 90), rng.choice([7, 64, 1024, 5000])), ()])
        spec = TensorSpec(name=f"t{number}", dtype=dtype, shape=shape)
        specs.append(spec)
        place = {"region": Region.whole(spec), "dtype": dtype, "strides": contiguous_strides(shape)}
        held.append(Placement(storage=number, offset=0, **place))  # type: ignore[arg-type]
        itemsize = spec.nbytes // max(spec.numel, 1)
        end = -(-(end + rng.choice([0, 0, 8, 2])) // itemsize) * itemsize
        wanted.append(Placement(storage=0, offset=end // itemsize, **place))  # type: ignore[arg-type]
        end += spec.nbytes
    manifest = Manifest.of(specs)
    sizes = [spec.nbytes for spec in specs]
    plan = compile_plan(
        manifest,
        {0: Layout(placements=tuple(held), storage_nbytes=tuple(sizes))},
        Layout(placements=tuple(wanted), storage_nbytes=(end + 100,)),
    )
    check(plan[0], manifest, random_storages(sizes), random_storages([end + 100]))


@pytest.mark.parametrize("case_name", list(CASES))
def test_every_case_of_the_transports(case_name: str, rng: random.Random) -> None:
    case = CASES[case_name](rng)
    # A bool of any other byte than 0 and 1 changes when it is copied as one; complex values are digested as bytes only.
    stand_in = {"complex64": "float64", "bool": "uint8"}
    copies = tuple(
        msgspec.structs.replace(
            c,
            dst_dtype=stand_in.get(c.dst_dtype, c.dst_dtype),
            src_dtype=stand_in.get(c.src_dtype, c.src_dtype),
        )
        for c in case.copies
    )
    if any(copy.src_dtype != copy.dst_dtype for copy in copies):
        pytest.skip("random bytes cast to NaNs, whose bits no two devices agree on")
    specs: dict[str, TensorSpec] = {}
    for copy in copies:
        shape = tuple(o + s + 3 for o, s in zip(copy.region.offsets, copy.sizes, strict=True))
        specs[copy.region.name] = TensorSpec(name=copy.region.name, dtype=copy.dst_dtype, shape=shape)
    check(
        copies,
        Manifest.of(specs.values()),
        random_storages(list(case.src_nbytes)),
        random_storages(list(case.dst_nbytes)),
    )


def test_casts_from_float32_masters(rng: random.Random) -> None:
    shape = (rng.randint(2, 50), 3 * rng.randint(1, 400))
    spec = TensorSpec(name="w", dtype="bfloat16", shape=shape)
    place = {"region": Region.whole(spec), "storage": 0, "offset": 0, "strides": contiguous_strides(shape)}
    plan = compile_plan(
        Manifest.of([spec]),
        {0: Layout(placements=(Placement(dtype="float32", **place),), storage_nbytes=(spec.numel * 4,))},  # type: ignore[arg-type]
        Layout(placements=(Placement(dtype="bfloat16", **place),), storage_nbytes=(spec.nbytes,)),  # type: ignore[arg-type]
    )
    values = torch.randn(shape).view(-1).view(torch.uint8).clone()
    check(plan[0], Manifest.of([spec]), [values], random_storages([spec.nbytes]))
