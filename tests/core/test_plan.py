"""Plans against a brute-force oracle: random shapes, random shardings on both sides, any strides, replicas and splits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from weightcast.content.layout_digest import LayoutDigest
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, PlanMismatch
from weightcast.layout import (
    TIMES_A_TENSOR,
    Layout,
    Placement,
    Region,
    contiguous_strides,
    image_layout,
    is_padded,
    most_placements,
    overlap,
)
from weightcast.layout.columns import unpack
from weightcast.layout.geometry import offset_of
from weightcast.layout.memory import Memory
from weightcast.layout.table import BOX, DTYPE, OFFSET, STORAGE, TENSOR, LayoutTable, PlacementTable
from weightcast.manifest import Manifest, TensorSpec, align
from weightcast.manifest.dtypes import DTYPE_NAMES, dtype_of
from weightcast.plan import Copy, CopyColumns, Holdings, HoldingTable, compile_plan, split
from weightcast.plan.replay import CPU_BLOCK_NBYTES, Replay

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool"]


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Random consecutive pieces of a dimension."""
    borders = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
    return [(a, b - a) for a, b in itertools.pairwise(borders)] or [(0, size)]


def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A random grid that tiles a shape."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size in shape:
        found = [((*o, start), (*n, length)) for o, n in found for start, length in cuts(draw, size)]
    return found


def random_strides(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor with its dimensions stored in random order."""
    order = draw(st.permutations(range(len(sizes))))
    dense = contiguous_strides(tuple(sizes[d] for d in order))
    strides = [0] * len(sizes)
    for d, stride in zip(order, dense, strict=True):
        strides[d] = stride
    return tuple(strides)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Manifest, dict[int, Layout], Layout]:
    specs = [
        TensorSpec(
            name=f"t{i}",
            dtype=draw(st.sampled_from(DTYPES)),
            shape=tuple(draw(st.lists(st.integers(0, 6), max_size=3))),
        )
        for i in range(draw(st.integers(1, 5)))
    ]
    num_ranks = draw(st.integers(1, 3))
    ends = dict.fromkeys(range(num_ranks), 0)
    held: dict[int, list[Placement]] = {rank: [] for rank in range(num_ranks)}
    wanted: list[Placement] = []
    end = 0

    def place(spec: TensorSpec, box: tuple[tuple[int, ...], tuple[int, ...]], start: int) -> tuple[Placement, int]:
        region = Region(name=spec.name, offsets=box[0], sizes=box[1])
        itemsize = dtype_of(spec.dtype).itemsize
        placement = Placement(
            region=region,
            dtype=spec.dtype,
            storage=0,
            offset=start // itemsize,
            strides=random_strides(draw, region.sizes),
        )
        return placement, align(start + region.numel * itemsize)

    for spec in specs:
        for box in boxes(draw, spec.shape):
            for rank in {draw(st.integers(0, num_ranks - 1)) for _ in range(2)}:
                placement, ends[rank] = place(spec, box, ends[rank])
                held[rank].append(placement)
        if draw(st.booleans()):
            for box in boxes(draw, spec.shape):
                if draw(st.booleans()):
                    placement, end = place(spec, box, end)
                    wanted.append(placement)
    holdings = {rank: Layout(placements=tuple(held[rank]), storage_nbytes=(ends[rank],)) for rank in held}
    return Manifest.of(specs), holdings, Layout(placements=tuple(wanted), storage_nbytes=(end,))


def fill(memory: Memory, layout: Layout, values: dict[str, torch.Tensor]) -> None:
    for p in layout.placements:
        view = memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides)
        view.copy_(box_of(values[p.region.name], p.region))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_overlaps_are_found_as_by_comparing_all_pairs(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 3))
    numbers = st.tuples(*[st.integers(0, 4)] * rank)
    boxes = data.draw(st.lists(st.tuples(numbers, numbers), max_size=6))
    regions = [Region(name="t", offsets=offsets, sizes=sizes) for offsets, sizes in boxes]
    pairs = itertools.combinations([set(_elements(region)) for region in regions], 2)
    assert overlap(regions) == any(one & other for one, other in pairs)


def _elements(region: Region) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(lambda start, size: range(start, start + size), region.offsets, region.sizes))


def box_of(whole: torch.Tensor, region: Region) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def random_values(manifest: Manifest) -> dict[str, torch.Tensor]:
    values = {}
    for spec in manifest.tensors:
        raw = torch.randint(0, 256, (max(spec.nbytes, 0),), dtype=torch.uint8)
        raw = raw & 1 if spec.dtype == "bool" else raw
        values[spec.name] = raw.view(dtype_of(spec.dtype)).view(spec.shape)
    return values


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@settings(max_examples=150, deadline=None)
@given(problem=problems(), max_nbytes=st.sampled_from([1, 16, 64, 2**20]))
def test_replaying_a_plan_fills_every_landing_and_nothing_else(
    problem: tuple[Manifest, dict[int, Layout], Layout], max_nbytes: int
) -> None:
    manifest, holdings, landings = problem
    values = random_values(manifest)
    sources = {}
    for rank, layout in holdings.items():
        sources[rank] = Memory([torch.randint(0, 256, (layout.storage_nbytes[0],), dtype=torch.uint8)])
        fill(sources[rank], layout, values)
    garbage = torch.randint(0, 256, (landings.storage_nbytes[0],), dtype=torch.uint8)
    expected, target = Memory([garbage.clone()]), Memory([garbage.clone()])
    fill(expected, landings, values)
    plan = compile_plan(manifest, holdings, landings)
    for rank, copies in plan.items():
        pieces = list(split(copies, max_nbytes))
        assert sum(piece.nbytes for piece in pieces) == sum(copy.nbytes for copy in copies)
        assert all(piece.nbytes <= max_nbytes or piece.region.numel == 1 for piece in pieces)
        Replay(pieces, sources[rank], target).run()
    assert torch.equal(target.storages[0], expected.storages[0])
    assert plan.digest == compile_plan(manifest, dict(reversed(holdings.items())), landings).digest


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_a_worker_compiles_the_same_plan_from_what_it_meets(
    problem: tuple[Manifest, dict[int, Layout], Layout],
) -> None:
    """Through the wire's form; and every copy is where it would be if boxes were intersected one by one."""
    manifest, holdings, landings = problem
    plan = compile_plan(manifest, holdings, landings)
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(plan.holdings), type=HoldingTable)
    again = compile_plan(manifest, Holdings.told(manifest, told), LayoutTable.of(landings, manifest))
    assert (again.digest, again.key) == (plan.digest, plan.key)
    assert dict(again) == dict(plan)
    given = {(rank, placement) for rank, layout in holdings.items() for placement in layout.placements}
    met = {
        p.region
        for _, p in given
        for w in landings.placements
        if w.region.name == p.region.name and w.region.intersect(p.region)
    }
    ranks = unpack([told.ranks], told.placements.count)[0].tolist()
    sent = set(zip(ranks, told.placements.placements(manifest), strict=True))
    assert sent == {(rank, placement) for rank, placement in given if placement.region in met}


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_every_copy_is_a_part_of_one_holding_and_one_landing(
    problem: tuple[Manifest, dict[int, Layout], Layout],
) -> None:
    manifest, holdings, landings = problem
    plan = compile_plan(manifest, holdings, landings)
    for rank, copies in plan.items():
        for copy in copies:
            assert any(_is_in(copy.region, copy.src_offset, copy.src_strides, p) for p in holdings[rank].placements)
            assert any(_is_in(copy.region, copy.dst_offset, copy.dst_strides, p) for p in landings.placements)
            assert copy.is_whole == (copy.region == Region.whole(manifest[copy.region.name]))
        columns = CopyColumns.of(copies, manifest)
        assert CopyColumns.of(tuple(copies), manifest).copies(manifest) == columns.copies(manifest) == copies
    wanted = sum(p.region.numel * dtype_of(p.dtype).itemsize for p in landings.placements)
    assert sum(copy.nbytes for copies in plan.values() for copy in copies) == wanted


def _is_in(region: Region, offset: int, strides: tuple[int, ...], placement: Placement) -> bool:
    """Whether a region lies at this place of a placement."""
    if region.name != placement.region.name or region.intersect(placement.region) != region:
        return False
    index = [at - base for at, base in zip(region.offsets, placement.region.offsets, strict=True)]
    return (offset, strides) == (placement.offset + offset_of(index, placement.strides), placement.strides)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_layouts_come_out_of_tables_as_they_went_in(problem: tuple[Manifest, dict[int, Layout], Layout]) -> None:
    manifest, holdings, landings = problem
    wider = Manifest.of([*manifest.tensors, *(spec_of((1,) * 5, name) for name in ("a", "t2a", "u"))])
    for layout in (*holdings.values(), landings):
        table = LayoutTable.of(layout, manifest)
        table.check(manifest)
        assert table.layout(manifest) == layout
        moved = table.of_manifest(manifest, wider)
        moved.check(wider)
        assert moved.layout(wider) == layout


def test_two_arenas_in_the_same_order_are_one_copy() -> None:
    specs = [TensorSpec(name=f"t{i}", dtype="bfloat16", shape=(i + 1, 7)) for i in range(100)]
    manifest = Manifest.of(specs)
    layout = image_layout(manifest)
    values = random_values(manifest)
    source = Memory([torch.zeros(manifest.image_nbytes, dtype=torch.uint8)], is_arena=True)
    target = Memory([torch.zeros(manifest.image_nbytes, dtype=torch.uint8)], is_arena=True)
    fill(source, layout, values)
    (copies,) = compile_plan(manifest, {0: layout}, layout).values()
    replay = Replay(copies, source, target)
    assert len(replay) == 1
    replay.run()
    assert torch.equal(source.storages[0], target.storages[0])


@st.composite
def arenas(draw: st.DrawFn) -> tuple[Manifest, Layout, Layout]:
    """A trainer's image, and an engine's memory of some rows of some tensors, at multiples of 256 bytes or side by side."""
    sizes = st.sampled_from([1, 8, 20, 31, 32, 33, 50, 64, 65])
    specs = [spec_of((draw(sizes),), f"t{i}") for i in draw(st.permutations(range(8)))]
    placements, end, spaced = [], 0, draw(st.booleans())
    for spec in specs:
        if draw(st.booleans()):
            continue
        start = draw(st.sampled_from([0, 0, spec.numel // 2]))
        region = Region(name=spec.name, offsets=(start,), sizes=(spec.numel - start,))
        end = align(end) if spaced or draw(st.booleans()) else end
        placements.append(Placement(region=region, dtype="float32", storage=0, offset=end // 4, strides=(1,)))
        end += region.numel * 4
    manifest = Manifest.of(specs)
    return manifest, image_layout(manifest), Layout(placements=tuple(placements), storage_nbytes=(align(end),))


@settings(max_examples=300, deadline=None)
@given(problem=arenas())
def test_padding_is_crossed_only_where_there_is_nothing_but_padding(problem: tuple[Manifest, Layout, Layout]) -> None:
    """Whatever is sliced, left out or packed side by side: landings are right, gaps stay zero, and digests are those of each alone."""
    manifest, held, landings = problem
    values = random_values(manifest)
    source, target, expected = (
        Memory([torch.zeros(layout.storage_nbytes, dtype=torch.uint8)], is_arena=is_padded(layout.placements))
        for layout in (held, landings, landings)
    )
    fill(source, held, values)
    fill(expected, landings, values)
    copies = compile_plan(manifest, {0: held}, landings).get(0, ())
    Replay(copies, source, target).run()
    assert torch.equal(target.storages[0], expected.storages[0])
    sides = Layout(placements=tuple(map(source_of, copies)), storage_nbytes=held.storage_nbytes)
    for layout, memory in ((landings, target), (sides, source)):
        alone = LayoutDigest(manifest, layout).of(memory)
        assert LayoutDigest(manifest, layout, gaps_are_zero=memory.is_arena).of(memory) == alone


def source_of(copy: Copy) -> Placement:
    return Placement(
        region=copy.region,
        dtype=copy.src_dtype,
        storage=copy.src_storage,
        offset=copy.src_offset,
        strides=copy.src_strides,
    )


def test_replicas_share_the_load() -> None:
    specs = [TensorSpec(name=f"t{i}", dtype="float32", shape=(64,)) for i in range(30)]
    manifest = Manifest.of(specs)
    layout = image_layout(manifest)
    plan = compile_plan(manifest, {0: layout, 1: layout, 2: layout}, layout)
    assert {rank: len(copies) for rank, copies in plan.items()} == {0: 10, 1: 10, 2: 10}


def spec_of(shape: tuple[int, ...], name: str = "w") -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def test_what_nobody_holds_is_named() -> None:
    wanted = image_layout(Manifest.of([spec_of((4,)), spec_of((2,), "missing")]))
    held = image_layout(Manifest.of([spec_of((4,))]))
    with pytest.raises(PlanMismatch, match="missing"):
        compile_plan(Manifest.of([spec_of((4,)), spec_of((2,), "missing")]), {0: held}, wanted)


def test_a_hole_in_the_holdings_is_named() -> None:
    manifest = Manifest.of([spec_of((4, 4))])
    half = Placement(
        region=Region(name="w", offsets=(0, 0), sizes=(2, 4)), dtype="float32", storage=0, offset=0, strides=(4, 1)
    )
    held = Layout(placements=(half,), storage_nbytes=(32,))
    with pytest.raises(PlanMismatch, match="8 of 16"):
        compile_plan(manifest, {0: held}, image_layout(manifest))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Manifest.of([spec_of((1,)), spec_of((2,))]),
        lambda: TensorSpec(name="w", dtype="float33", shape=()),
        lambda: TensorSpec(name="w", dtype="float32", shape=(-1,)),
        lambda: TensorSpec(name="", dtype="float32", shape=()),
        lambda: Region(name="w", offsets=(0,), sizes=(1, 2)),
        lambda: Region(name="w", offsets=(-1,), sizes=(1,)),
        lambda: Layout(placements=image_layout(Manifest.of([spec_of((9,))])).placements, storage_nbytes=(8,)),
    ],
)
def test_bad_records_are_refused(make: object) -> None:
    with pytest.raises(InvalidInput):
        make()  # type: ignore[operator]


def test_a_manifest_is_sorted_by_name() -> None:
    specs = [spec_of((2,), name) for name in ("b", "a.1", "a", "B", "a.10")]
    assert [spec.name for spec in Manifest.of(specs).tensors] == ["B", "a", "a.1", "a.10", "b"]
    with pytest.raises(InvalidInput, match="sorted by name"):
        Manifest(tensors=tuple(specs))


@pytest.mark.parametrize("landing", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("published", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
def test_values_are_cast_through_the_published_type(held: str, published: str, landing: str) -> None:
    """In blocks where they are cast twice; also strided."""
    rows = CPU_BLOCK_NBYTES // 2 // 500 + 7
    for strides in ((500, 1), (1, rows)):
        spec = TensorSpec(name="w", dtype=published, shape=(rows, 500))
        sides = [
            Layout(
                placements=(Placement(region=Region.whole(spec), dtype=dtype, storage=0, offset=0, strides=steps),),
                storage_nbytes=(rows * 500 * dtype_of(dtype).itemsize,),
            )
            for dtype, steps in ((held, (500, 1)), (landing, strides))
        ]
        (copies,) = compile_plan(Manifest.of([spec]), {0: sides[0]}, sides[1]).values()
        assert copies[0].is_plain == (held == published == landing)
        assert bool(copies[0].via) == (published not in (held, landing))
        values = torch.randn(rows, 500).to(dtype_of(held))
        target = Memory([torch.zeros(sides[1].storage_nbytes, dtype=torch.uint8)])
        replay = Replay(copies, Memory([values.view(-1).view(torch.uint8)]), target)
        replay.run()
        assert (len(replay) > 1) == bool(copies[0].via)
        live = target.view(0, landing, 0, (rows, 500), strides)
        assert same_bytes(live, values.to(dtype_of(published)).to(dtype_of(landing)))


def test_the_manifest_names_its_form() -> None:
    a = Manifest.of([spec_of((4,)), spec_of((2,), "v")])
    assert a.digest == Manifest.of([spec_of((2,), "v"), spec_of((4,))]).digest
    others = [
        Manifest.of([spec_of((4,)), spec_of((2,), "u")]),
        Manifest.of([spec_of((4, 1)), spec_of((2,), "v")]),
        Manifest.of([TensorSpec(name="w", dtype="int32", shape=(4,)), spec_of((2,), "v")]),
    ]
    assert len({a.digest, *(other.digest for other in others)}) == 4
    assert a.nbytes == 24
    assert a.positions == {"v": 0, "w": 256}
    assert math.prod(a["w"].shape) == a["w"].numel


def test_landings_that_no_loader_leaves_behind_are_refused_before_they_are_planned() -> None:
    manifest = Manifest.of(TensorSpec(name=f"w{i}", dtype="uint8", shape=(4,)) for i in range(3))
    one = image_layout(manifest).placements[0]
    fits = Layout(placements=(one,) * TIMES_A_TENSOR, storage_nbytes=(1024,))
    LayoutTable.of(fits, manifest).check_landings(manifest)
    with pytest.raises(InvalidInput, match=f"w0 is wanted more than {TIMES_A_TENSOR} times"):
        LayoutTable.of(replace(fits, placements=(one,) * (TIMES_A_TENSOR + 1)), manifest).check_landings(manifest)
    empty = replace(one, region=Region(name="w0", offsets=(0,), sizes=(0,)))
    many = replace(fits, placements=(empty,) * (most_placements(manifest) + 1))
    with pytest.raises(InvalidInput, match=f"at most {most_placements(manifest)} are taken"):
        LayoutTable.of(many, manifest).check_landings(manifest)
    with pytest.raises(InvalidInput, match="through the loader"):
        LayoutTable.of(replace(fits, through_loader=("w0", "stranger")), manifest).check_landings(manifest)


@pytest.mark.parametrize(
    ("column", "number", "said"),
    [
        (TENSOR, 2, "not as many tensors"),
        (DTYPE, len(DTYPE_NAMES), "unknown dtype"),
        (STORAGE, 1, "w: a storage that is not in the layout"),
        (OFFSET, 53, "w: a place past the end of its storage"),
        (OFFSET, 2**63 - 1, "w: a place past the end of any storage"),
        (BOX, 1, "w: a region that is outside of the tensor's shape"),
        (BOX + 1, 2**63 - 1, "w: a region that is outside of the tensor's shape"),
        (BOX + 2, 4, "w: a region that is outside of the tensor's shape"),
        (BOX + 4, 2**40, "w: a place past the end of its storage"),
        (BOX + 5, 2**62, "w: a place past the end of any storage"),
    ],
)
def test_tables_of_what_cannot_be_are_refused(column: int, number: int, said: str) -> None:
    manifest = Manifest.of([spec_of((3, 4)), spec_of((5,), "v")])
    table = LayoutTable.of(image_layout(manifest, ("w",)), manifest)
    numbers = table.placements.numbers()
    numbers[column] = number
    with pytest.raises(InvalidInput, match=said):
        replace(table, placements=PlacementTable.packed(numbers, 2)).check(manifest)


def test_few_bytes_do_not_claim_many_rows() -> None:
    manifest = Manifest.of([spec_of((3, 4))])
    table = LayoutTable.of(image_layout(manifest), manifest).placements
    with pytest.raises(InvalidInput, match="a column of 2 bytes for 1000000 numbers"):
        replace(table, count=10**6).numbers()
    with pytest.raises(InvalidInput, match="a column of 9 bytes for 1 numbers"):
        replace(table, columns=(bytes(9), *table.columns[1:])).numbers()


def test_replicas_give_what_evens_out_the_load() -> None:
    """A rank that holds something alone gives less of what others hold, too; which ranks hold a box may differ."""
    manifest = Manifest.of([spec_of((300,), "alone"), *(spec_of((10,), f"t{i:02}") for i in range(60))])
    shared = image_layout(manifest, tuple(f"t{i:02}" for i in range(60)))
    holdings = {0: image_layout(manifest), 5: shared, 7: shared}
    plan = compile_plan(manifest, holdings, image_layout(manifest))
    assert {rank: sum(copy.nbytes for copy in copies) for rank, copies in plan.items()} == {0: 1200, 5: 1200, 7: 1200}


def test_planning_stops_where_it_is_told_to() -> None:
    manifest = Manifest.of([TensorSpec(name="w", dtype="uint8", shape=(4,))])
    layout = image_layout(manifest)
    with pytest.raises(DeadlineExceeded, match="planning"):
        compile_plan(manifest, {0: layout}, layout, check=lambda: Deadline(1e-9).check("planning"))


def test_a_million_dimensions_are_refused_before_they_are_multiplied() -> None:
    many = (2**62,) * 1_000_000
    with pytest.raises(InvalidInput, match="1000000 dimensions, more than 64"):
        TensorSpec(name="w", dtype="float32", shape=many)
    with pytest.raises(InvalidInput, match="1000000 dimensions, more than 64"):
        Region(name="w", offsets=many, sizes=many)
    for shape in ((2**63, 0), (2**32, 2**31, 0)):  # no bytes, and strides that no message can carry
        with pytest.raises(InvalidInput, match="too large a size"):
            TensorSpec(name="w", dtype="float32", shape=shape)
    assert TensorSpec(name="w", dtype="float32", shape=(2,) * 62).numel == 2**62
