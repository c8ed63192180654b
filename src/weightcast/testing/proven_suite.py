"""The conformance suite of copy and digest in one pass: the bytes of a plain replay, and the digest that a second look gives.

Subclass ``ProvenSuite`` in a test module, name it ``Test...`` and say how to run; one subclass a kind of memory.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec
import pytest
import torch

from weightcast.content.layout_digest import LayoutDigest
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import dtype_of, itemsize_of
from weightcast.plan import Copy, compile_plan, landing_of
from weightcast.plan.replay import Replay
from weightcast.testing.transport_cases import CASES


class ProvenSuite(ABC):
    """Every test draws fresh random values, twice for each compiled replay."""

    device = "cpu"

    @abstractmethod
    def compile(self, copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest) -> Callable[[], int]:
        """Return a function that copies everything, and then returns the digest of all destinations."""

    @pytest.fixture
    def rng(self) -> random.Random:
        return random.Random(random.SystemRandom().getrandbits(32))

    def check(
        self, copies: Sequence[Copy], manifest: Manifest, src: list[torch.Tensor], dst: list[torch.Tensor]
    ) -> None:
        """Run a replay twice, with other values the second time. Bytes around the destinations have to stay."""
        source, target = (Memory([storage.to(self.device, copy=True) for storage in side]) for side in (src, dst))
        expected = Memory([storage.clone() for storage in dst])
        proven = self.compile(copies, source, target, manifest)
        assert all(torch.equal(got.cpu(), was) for got, was in zip(target.storages, dst, strict=True))
        landings = Layout(placements=tuple(map(landing_of, copies)), storage_nbytes=tuple(d.numel() for d in dst))
        for _ in range(2):
            for storage, values in zip(source.storages, src, strict=True):
                values.copy_(torch.randint(0, 2, values.shape, dtype=torch.uint8) * values)
                storage.copy_(values)
            Replay(copies, Memory(src), expected).run()
            digest = proven()
            for got, wanted in zip(target.storages, expected.storages, strict=True):
                assert torch.equal(got.cpu(), wanted)
            assert digest == LayoutDigest(manifest, landings).of(target)

    def test_fused_parameters_of_odd_sizes(self, rng: random.Random) -> None:
        """Tensors one by one at the trainer, side by side in the engine, at word borders and at others."""
        specs, held, wanted, end = [], [], [], 0
        for number in range(60):
            dtype = rng.choice(["bfloat16", "float32", "float8_e4m3fn", "int64"])
            shape = rng.choice([(rng.randint(1, 9),), (rng.randint(1, 90), rng.choice([7, 64, 1024, 5000])), ()])
            spec = TensorSpec(name=f"t{number}", dtype=dtype, shape=shape)
            specs.append(spec)
            itemsize = spec.nbytes // max(spec.numel, 1)
            held.append(_whole(spec, storage=number))
            end = -(-(end + rng.choice([0, 0, 8, 2])) // itemsize) * itemsize
            wanted.append(_whole(spec, offset=end // itemsize))
            end += spec.nbytes
        manifest = Manifest.of(specs)
        sizes = [spec.nbytes for spec in specs]
        self.check(_plan(manifest, held, sizes, wanted, end + 100), manifest, _random(sizes), _random([end + 100]))

    @pytest.mark.parametrize("case_name", list(CASES))
    def test_every_case_of_the_transports(self, case_name: str, rng: random.Random) -> None:
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
        if not all(copy.is_plain for copy in copies):
            pytest.skip("random bytes cast to NaNs, whose bits no two devices agree on")
        specs: dict[str, TensorSpec] = {}
        for copy in copies:
            shape = tuple(o + s + 3 for o, s in zip(copy.region.offsets, copy.sizes, strict=True))
            specs[copy.region.name] = TensorSpec(name=copy.region.name, dtype=copy.dst_dtype, shape=shape)
        src, dst = _random(list(case.src_nbytes)), _random(list(case.dst_nbytes))
        self.check(copies, Manifest.of(specs.values()), src, dst)

    @pytest.mark.parametrize("landing", ["bfloat16", "float16", "float32"])
    def test_casts_from_float32_masters(self, landing: str, rng: random.Random) -> None:
        """Published in bfloat16, whatever the engine's type."""
        shape = (rng.randint(2, 50), 3 * rng.randint(1, 400))
        spec = TensorSpec(name="w", dtype="bfloat16", shape=shape)
        manifest, nbytes = Manifest.of([spec]), spec.numel * itemsize_of(landing)
        held, wanted = ([msgspec.structs.replace(_whole(spec), dtype=dtype)] for dtype in ("float32", landing))
        copies = _plan(manifest, held, [spec.numel * 4], wanted, nbytes)
        values, target = torch.randn(shape).view(-1), _random([nbytes])
        self.check(copies, manifest, [values.view(torch.uint8).clone()], target)
        dst = Memory([target[0].to(self.device)])
        self.compile(copies, Memory([values.view(torch.uint8).to(self.device)]), dst, manifest)()
        assert torch.equal(
            dst.view(0, landing, 0, shape, (shape[1], 1)).cpu().view(-1), values.bfloat16().to(dtype_of(landing))
        )

    def test_landings_that_others_overwrite(self, rng: random.Random) -> None:
        """Tied parameters of the engine, two different tensors of the trainer: what lies there is one of them, and says so."""
        shape = (rng.randint(3, 40), 8 * rng.randint(2, 90))
        specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name in ("embed", "between", "head")]
        manifest, nbytes = Manifest.of(specs), specs[0].nbytes
        held = [_whole(spec, storage=number) for number, spec in enumerate(specs)]
        wanted = [_whole(spec, offset=offset // 4) for spec, offset in zip(specs, (0, nbytes, 0), strict=True)]
        copies = _plan(manifest, held, [nbytes] * 3, wanted, 2 * nbytes)
        source = Memory([storage.to(self.device) for storage in _random([nbytes] * 3)])
        target = Memory([storage.to(self.device) for storage in _random([2 * nbytes])])
        digest = self.compile(copies, source, target, manifest)()
        landings = Layout(placements=tuple(wanted), storage_nbytes=(2 * nbytes,))
        assert digest == LayoutDigest(manifest, landings).of(target)
        assert digest != LayoutDigest(manifest, Layout(placements=tuple(held), storage_nbytes=(nbytes,) * 3)).of(source)


def _random(sizes: list[int]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]


def _whole(spec: TensorSpec, *, storage: int = 0, offset: int = 0) -> Placement:
    return Placement(
        region=Region.whole(spec),
        dtype=spec.dtype,
        storage=storage,
        offset=offset,
        strides=contiguous_strides(spec.shape),
    )


def _plan(
    manifest: Manifest, held: list[Placement], held_nbytes: list[int], wanted: list[Placement], wanted_nbytes: int
) -> tuple[Copy, ...]:
    holdings = {0: Layout(placements=tuple(held), storage_nbytes=tuple(held_nbytes))}
    landings = Layout(placements=tuple(wanted), storage_nbytes=(wanted_nbytes,))
    return tuple(compile_plan(manifest, holdings, landings)[0])
