"""Geometry against sets of bytes: boxes, rows and runs name exactly the elements that their sizes and strides do."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from weightcast.layout import geometry as geo

SIZES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def walked(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Every element's place, by counting."""
    return [
        sum(at * s for at, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, sizes))
    ]


def spread(rows: geo.Rows, place: int) -> list[int]:
    return [int(start) + step for start in rows.starts[place] for step in range(rows.length)]


@st.composite
def strides_of(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Contiguous, permuted, padded or any strides."""
    order = draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), 1
    for dim in order[::-1]:
        strides[dim] = step
        step = step * max(sizes[dim], 1) + draw(st.sampled_from([0, 0, 0, 1, 3]))
    return tuple(draw(st.sampled_from([tuple(strides), geo.contiguous_strides(sizes), tuple(s % 5 for s in strides)])))


@given(st.data())
def test_boxes_rows_and_runs_name_the_elements_that_they_stand_for(data: st.DataObject) -> None:
    sizes = data.draw(SIZES)
    first, second = data.draw(strides_of(sizes)), data.draw(strides_of(sizes))
    there, here = walked(sizes, first), walked(sizes, second)

    assert geo.span(sizes, first) == (max(there) + 1 if there else 0)
    assert geo.offsets(sizes, first).tolist() == there
    assert walked(sizes, geo.contiguous_strides(sizes)) == list(range(len(there)))
    if there:
        assert geo.is_contiguous(sizes, first) == (there == list(range(len(there))))
        fewer, places = geo.collapse(sizes, first, second)
        assert [walked(fewer, place) for place in places] == [there, here]
        assert 1 not in fewer

    both = geo.rows(sizes, first, second)
    assert (spread(both, 0), spread(both, 1)) == (there, here)
    alone = geo.touched(sizes, first)
    assert set(spread(alone, 0)) == set(there)

    # Ranges of bytes: the rows of both boxes, in one storage.
    others = geo.touched(sizes, second)
    starts = torch.cat([alone.starts[0], others.starts[0]])
    ends = torch.cat([alone.starts[0] + alone.length, others.starts[0] + others.length])
    low, high = geo.union(starts, ends)
    covered = [at for start, end in zip(low.tolist(), high.tolist(), strict=True) for at in range(start, end)]
    assert covered == sorted(set(there) | set(here))
    assert all(end < start for end, start in zip(high.tolist(), low.tolist()[1:], strict=False))

    # Runs: the rows of a copy from one place to the other, cut at random, with slack behind some.
    slack = data.draw(st.integers(0, 2))
    runs = [
        geo.Run(
            (0, data.draw(st.integers(0, 1))),
            (int(one), int(other)),
            both.length,
            data.draw(st.sampled_from([0, slack])),
        )
        for one, other in zip(*both.starts, strict=True)
    ]
    pairs = {(run.where, run.starts[0] + i, run.starts[1] + i) for run in runs for i in range(run.nbytes)}
    alignment = data.draw(st.integers(1, 2))
    merged = geo.joined(runs, alignment=alignment)
    again = {(run.where, run.starts[0] + i, run.starts[1] + i) for run in merged for i in range(run.nbytes)}
    assert pairs <= again
    assert len(merged) <= len(runs)
    if not slack:
        assert again == pairs
        for one, other in itertools.pairwise(merged):
            continues = {b - a - one.nbytes for a, b in zip(one.starts, other.starts, strict=True)} == {0}
            assert one.where != other.where or not continues
    beyond = again - pairs
    assert all(
        any(run.where == where and 0 <= at - run.starts[0] - run.nbytes < run.slack for run in runs)
        for where, at, _ in beyond
    )
