"""Meeting: whether values of several trainer ranks land in the same bytes of a worker, as those of tied tensors may."""

from __future__ import annotations

import numpy as np

from weightcast.layout.columns import Numbers
from weightcast.layout.table import BOX, DTYPE, OFFSET, STORAGE, TENSOR, LayoutTable
from weightcast.manifest.dtypes import ITEMSIZES
from weightcast.plan import table as copies
from weightcast.plan.table import Plan


def ranks_meet(plan: Plan, landings: LayoutTable) -> bool:
    """Whether copies from several trainer ranks may write the same bytes. ``plan`` is what the landings were compiled to.

    Judged by the first and last byte of each copy, and only of tensors whose landings lie in one another's way.
    """
    if len(plan) < 2:
        return False
    placed = landings.placements.numbers()
    dims = landings.placements.dims
    strides, sizes = placed[BOX + 2 * dims :], placed[BOX + dims : BOX + 2 * dims]
    stretches = _stretches(placed[STORAGE], placed[OFFSET], placed[DTYPE], sizes, strides)
    groups, crowded = np.unique(stretches, return_counts=True)
    several = np.isin(stretches, groups[(crowded > 1) & (groups >= 0)])
    if not several.any():
        return False
    ranks, rows = plan.rows()
    of_these = np.isin(rows[copies.TENSOR], placed[TENSOR, several])
    ranks, rows = ranks[of_these], rows[:, of_these]
    dims = (len(rows) - copies.BOX) // 4
    sizes, strides = rows[copies.BOX + dims : copies.BOX + 2 * dims], rows[copies.BOX + 3 * dims :]
    stretches = _stretches(rows[copies.DST_STORAGE], rows[copies.DST_OFFSET], rows[copies.DST_DTYPE], sizes, strides)
    givers = np.unique(np.stack([stretches, ranks])[:, stretches >= 0], axis=1)
    return bool((np.diff(givers[0]) == 0).any())


def _stretches(storages: Numbers, offsets: Numbers, dtypes: Numbers, sizes: Numbers, strides: Numbers) -> Numbers:
    """A number for each box in memory, equal for those that hang together by bytes that they share; -1 for boxes without elements."""
    itemsizes = ITEMSIZES[dtypes]
    starts = offsets * itemsizes
    ends = starts + (((sizes - 1) * strides).sum(axis=0) + 1) * itemsizes
    found = np.full(len(storages), -1, np.int64)
    filled = np.flatnonzero((sizes > 0).all(axis=0))
    order = filled[np.lexsort((starts[filled], storages[filled]))]
    # Storages one behind the other, so that one sweep passes over all of them.
    begins = np.zeros(int(storages.max(initial=-1)) + 2, np.int64)
    np.maximum.at(begins, storages[order] + 1, ends[order])
    bases = np.cumsum(begins)[storages[order]]
    reached = np.maximum.accumulate(ends[order] + bases)
    begins_anew = np.ones(len(order), bool)
    begins_anew[1:] = starts[order][1:] + bases[1:] >= reached[:-1]
    found[order] = np.cumsum(begins_anew)
    return found
