"""Compiling: which holdings fill which landings. A pure function of manifest and layouts, computed on whole columns.

For every landing the boxes of the same tensor are intersected with the landing; each common box is one copy. Where several trainer ranks
hold the same box, the load spreads over them: the bytes of all boxes with the same holders, in manifest order, are cut into one range
for each holder, so that those who give less elsewhere give more here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from weightcast.errors import PlanMismatch
from weightcast.layout.columns import Numbers
from weightcast.layout.table import BOX, DTYPE, OFFSET, STORAGE, TENSOR
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import ITEMSIZES
from weightcast.plan import table as copies
from weightcast.plan.holdings import AnyLayout, Holdings, as_table, spread, widened
from weightcast.plan.table import Indices, Plan, Rows

BLOCK = 2**18
"""Pairs of a landing and a box that are looked at together: what that takes is bounded."""


class _Pairs(NamedTuple):
    """Which row of the landings meets which box, in the order of the landings."""

    landings: Numbers
    boxes: Numbers


def compile_plan(
    manifest: Manifest,
    holdings: Holdings | Mapping[int, AnyLayout],
    landings: AnyLayout,
    *,
    check: Callable[[], None] = lambda: None,
) -> Plan:
    """The copies that fill every landing of one worker, by trainer rank (ranks that give nothing are absent).

    Raises PlanMismatch when a landing is not covered by holdings. All layouts lie inside the manifest's tensors. Distinct holdings of one
    tensor must not overlap unless they are equal (replicas). ``check`` is called now and then and may raise.
    """
    held = holdings if isinstance(holdings, Holdings) else Holdings.of(manifest, holdings)
    wanted = widened(as_table(landings, manifest).placements, held.dims)
    wanted = wanted[:, np.argsort(wanted[TENSOR], kind="stable")]
    pairs = _pairs(held, wanted, check)
    check()
    sources = (held.firsts[pairs.boxes] + _replicas(held, wanted, pairs)).astype(np.int32)
    targets = pairs.landings.astype(np.int32)

    def make(rows: Rows) -> Numbers:
        return _numbers(held, wanted, sources[rows], targets[rows])

    return Plan(manifest, held.ranks[sources], make, lambda: held.boxes_of(sources))


def _pairs(held: Holdings, wanted: Numbers, check: Callable[[], None]) -> _Pairs:
    """All pairs with a common element; PlanMismatch where they do not cover a landing."""
    sizes = wanted[BOX + held.dims : BOX + 2 * held.dims]
    numel = sizes.prod(axis=0)
    starts, ends = held.reaches(wanted)
    # Boxes and landings are boxes of one tensor, so those that meet also meet as ranges from first to last element.
    lows = np.searchsorted(held.reached, starts, side="right")
    counts = np.maximum(np.searchsorted(held.starts, ends, side="left") - lows, 0) * (numel > 0)
    found: list[_Pairs] = []
    blocks = np.flatnonzero(np.diff(np.cumsum(counts) // BLOCK, prepend=-1)).tolist()
    for first, last in itertools.pairwise([*blocks, len(counts)]):
        check()
        rows = np.arange(first, last)
        pairs = _Pairs(np.repeat(rows, counts[first:last]), spread(lows[first:last], counts[first:last]))
        box_sizes = _common(held, wanted, pairs)[1]
        meets = (box_sizes > 0).all(axis=0)
        covered = np.zeros(last - first, np.int64)
        np.add.at(covered, pairs.landings[meets] - first, box_sizes[:, meets].prod(axis=0))
        if bool((short := covered != numel[first:last]).any()):
            at = int(np.argmax(short))
            raise _not_held(held, int(wanted[TENSOR, first + at]), int(covered[at]), int(numel[first + at]))
        found.append(_Pairs(pairs.landings[meets], pairs.boxes[meets]))
    none = np.empty(0, np.int64)
    return (
        _Pairs(*(np.concatenate([none, *column]) for column in zip(*found, strict=True)))
        if found
        else _Pairs(none, none)
    )


def _not_held(held: Holdings, tensor: int, covered: int, numel: int) -> PlanMismatch:
    name, rows = held.manifest.tensors[tensor].name, held.rows_of(tensor)
    if rows.start == rows.stop:
        return PlanMismatch(f"nobody holds {name!r}")
    return PlanMismatch(f"{name}: {covered} of {numel} wanted elements are held by the trainer")


def _common(held: Holdings, wanted: Numbers, pairs: _Pairs) -> tuple[Numbers, Numbers]:
    """Offsets and sizes of what landing and box of each pair have in common; sizes of 0 or less where that is nothing."""
    return _intersected(wanted[:, pairs.landings], held.numbers[:, held.firsts[pairs.boxes]], held.dims)


def _intersected(one: Numbers, other: Numbers, dims: int) -> tuple[Numbers, Numbers]:
    offsets, sizes = one[BOX : BOX + dims], one[BOX + dims : BOX + 2 * dims]
    other_offsets, other_sizes = other[BOX : BOX + dims], other[BOX + dims : BOX + 2 * dims]
    starts = np.maximum(offsets, other_offsets)
    return starts, np.minimum(offsets + sizes, other_offsets + other_sizes) - starts


def _replicas(held: Holdings, wanted: Numbers, pairs: _Pairs) -> Numbers:
    """Which of its box's replicas gives each pair."""
    counts = held.replicas[pairs.boxes]
    chosen = np.zeros_like(counts)
    if int(counts.max(initial=1)) == 1:
        return chosen
    sizes = _common(held, wanted, pairs)[1]
    nbytes = sizes.prod(axis=0) * ITEMSIZES[wanted[DTYPE, pairs.landings]]
    ranks, places = np.unique(held.ranks, return_inverse=True)
    alone = counts == 1
    load = np.zeros(len(ranks), np.int64)
    np.add.at(load, places[held.firsts[pairs.boxes[alone]]], nbytes[alone])
    shared = np.flatnonzero(~alone)
    kinds, kind_of = np.unique(_holders(held)[pairs.boxes[shared]], return_inverse=True)
    order = np.argsort(kind_of, kind="stable")
    bounds = np.searchsorted(kind_of[order], np.arange(len(kinds) + 1))
    for start, end in itertools.pairwise(bounds.tolist()):
        of_kind = shared[order[start:end]]
        box = pairs.boxes[of_kind[0]]
        holders = places[held.firsts[box] : held.firsts[box] + held.replicas[box]]
        shares = _shares(load[holders], int(nbytes[of_kind].sum()))
        load[holders] += shares
        middles = np.cumsum(nbytes[of_kind]) - nbytes[of_kind] // 2 - 1
        chosen[of_kind] = np.minimum(np.searchsorted(np.cumsum(shares), middles, side="right"), len(holders) - 1)
    return chosen


def _holders(held: Holdings) -> Numbers:
    """A number for each box, equal for boxes that the same ranks hold: the sum of a random-looking number for each rank."""
    mixed = (held.ranks.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return np.add.reduceat(mixed, held.firsts) if len(held.firsts) else held.firsts


def _shares(load: Numbers, nbytes: int) -> Numbers:
    """``nbytes`` cut into one share for each holder, so that those with less load get more; the last ones get what does not divide."""
    ascending = np.sort(load)
    levels = (nbytes + np.cumsum(ascending)) // np.arange(1, len(load) + 1)
    filled = int(np.flatnonzero(levels >= ascending).max(initial=0))
    shares = np.maximum(levels[filled] - load, 0)
    shares[np.argmax(shares)] += nbytes - int(shares.sum())
    return np.asarray(shares, np.int64)


def _numbers(held: Holdings, wanted: Numbers, rows: Indices, targets: Indices) -> Numbers:
    """The copies from rows of the holdings to rows of the landings."""
    dims = held.dims
    source, target = held.numbers[:, rows], wanted[:, targets]
    offsets, sizes = _intersected(target, source, dims)
    found = np.zeros((copies.BOX + 4 * dims, len(rows)), np.int64)
    tensor = found[copies.TENSOR] = source[TENSOR]
    found[copies.PART] = np.where(np.isin(held.ranks[rows], held.streamed), source[STORAGE], 0)
    found[copies.IS_WHOLE] = (sizes == held.manifest.shapes[:, tensor]).all(axis=0)
    published = held.manifest.dtype_numbers[tensor]
    is_between = (published != source[DTYPE]) & (published != target[DTYPE])
    found[copies.VIA] = np.where(is_between, published + 1, 0)
    for side, (storage, dtype, offset), strides in (
        (source, (copies.SRC_STORAGE, copies.SRC_DTYPE, copies.SRC_OFFSET), 2),
        (target, (copies.DST_STORAGE, copies.DST_DTYPE, copies.DST_OFFSET), 3),
    ):
        side_offsets, side_strides = side[BOX : BOX + dims], side[BOX + 2 * dims :]
        found[storage], found[dtype] = side[STORAGE], side[DTYPE]
        found[offset] = side[OFFSET] + ((offsets - side_offsets) * side_strides).sum(axis=0)
        found[copies.BOX + strides * dims : copies.BOX + (strides + 1) * dims] = side_strides
    found[copies.BOX : copies.BOX + dims], found[copies.BOX + dims : copies.BOX + 2 * dims] = offsets, sizes
    return found
