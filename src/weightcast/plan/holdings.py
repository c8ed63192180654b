"""Holdings: what trainer ranks hold, as one table in the order in which plans look things up. A *box* is a region that one or more
ranks hold: its rows are replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from weightcast.errors import InvalidInput
from weightcast.layout import Layout
from weightcast.layout.columns import Numbers, pack, unpack
from weightcast.layout.table import BOX, TENSOR, LayoutTable, PlacementTable
from weightcast.manifest import Manifest

AnyLayout: TypeAlias = Layout | LayoutTable


class HoldingTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Holdings of several trainer ranks on the wire. ``streamed`` has the ranks whose storages are windows of a stream."""

    ranks: bytes
    """A column."""
    placements: PlacementTable
    streamed: tuple[int, ...] = ()


class Holdings:
    """All holdings of some ranks, by tensor, by first element, and by rank. Boxes without elements are left out.

    Each attribute is a column: ``ranks`` and those of ``numbers`` have a row for each holding, the others one for each box.
    """

    def __init__(self, manifest: Manifest, ranks: Numbers, numbers: Numbers, streamed: tuple[int, ...]) -> None:
        """``numbers`` has columns for as many dimensions as the manifest has."""
        self.manifest, self.streamed = manifest, streamed
        self.dims = dims = len(manifest.shapes)
        self.strides = _strides(manifest.shapes)
        """Of a tensor's elements in the tensor, by dimension and tensor."""
        numel = manifest.shapes.prod(axis=0)
        if numel.sum(dtype=float) >= 2.0**62:
            raise InvalidInput("a manifest of more than 2^62 elements cannot be planned for", field="tensors")
        self.bases = np.cumsum(numel) - numel
        """Elements of all tensors before each one."""
        has_elements = numbers[BOX + dims : BOX + 2 * dims].all(axis=0)
        ranks, numbers = ranks[has_elements], numbers[:, has_elements]
        starts, ends = self.reaches(numbers)
        order = np.lexsort((ranks, starts))
        self.ranks, self.numbers, starts, ends = ranks[order], numbers[:, order], starts[order], ends[order]
        region = np.concatenate([self.numbers[TENSOR : TENSOR + 1], self.numbers[BOX : BOX + 2 * dims]])
        is_first = np.concatenate([[True], (region[:, 1:] != region[:, :-1]).any(axis=0)])[: len(order)]
        self.firsts = np.flatnonzero(is_first)
        """The first row of each box."""
        self.replicas = np.diff(self.firsts, append=len(order))
        """How many rows each box has."""
        self.starts = starts[self.firsts]
        """The number of a box's first element, counted over all tensors."""
        self.reached = np.maximum.accumulate(ends[self.firsts]) if len(order) else ends
        """One past the last element of this box and all before it."""

    @classmethod
    def of(cls, manifest: Manifest, layouts: Mapping[int, AnyLayout]) -> Holdings:
        """What ranks with these layouts hold."""
        tables = {rank: as_table(layout, manifest) for rank, layout in sorted(layouts.items())}
        dims = len(manifest.shapes)
        parts = [widened(table.placements, dims) for table in tables.values()]
        ranks = np.repeat(np.array(list(tables), np.int64), [table.placements.count for table in tables.values()])
        numbers = np.concatenate([np.empty((BOX + 3 * dims, 0), np.int64), *parts], axis=1)
        return cls(manifest, ranks, numbers, tuple(rank for rank, table in tables.items() if table.is_streamed))

    @classmethod
    def told(cls, manifest: Manifest, table: HoldingTable) -> Holdings:
        """What a trainer says that its ranks hold; InvalidInput for what cannot be."""
        table.placements.check(manifest)
        (ranks,) = unpack([table.ranks], table.placements.count)
        return cls(manifest, ranks, widened(table.placements, len(manifest.shapes)), table.streamed)

    def boxes_of(self, rows: npt.NDArray[np.signedinteger[Any]]) -> HoldingTable:
        """All holdings of the boxes that these rows are replicas of."""
        is_met = np.zeros(len(self.ranks), np.bool_)
        is_met[rows] = True
        boxes = np.logical_or.reduceat(is_met, self.firsts) if len(rows) else is_met[self.firsts]
        rows = np.flatnonzero(np.repeat(boxes, self.replicas))
        ranks = self.ranks[rows]
        return HoldingTable(
            ranks=pack(ranks[None])[0],
            placements=PlacementTable.packed(self.numbers[:, rows], self.dims),
            streamed=tuple(rank for rank in self.streamed if rank in ranks),
        )

    def rows_of(self, tensor: int) -> slice:
        """The rows of one tensor."""
        return slice(*np.searchsorted(self.numbers[TENSOR], [tensor, tensor + 1]).tolist())

    def reaches(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """For each row of a table of placements the number of its first element, and one past that of its last one."""
        tensor = numbers[TENSOR]
        offsets, sizes, _ = numbers[BOX:].reshape(3, self.dims, numbers.shape[1])
        strides = self.strides[:, tensor]
        starts = self.bases[tensor] + (offsets * strides).sum(axis=0)
        return starts, starts + ((sizes - 1) * strides).sum(axis=0) + 1


def as_table(layout: AnyLayout, manifest: Manifest) -> LayoutTable:
    """The layout as a table."""
    return layout if isinstance(layout, LayoutTable) else LayoutTable.of(layout, manifest)


def widened(table: PlacementTable, dims: int) -> Numbers:
    """The numbers of a table, with columns for so many dimensions."""
    numbers = table.numbers()
    if table.dims == dims:
        return numbers
    wide = np.zeros((BOX + 3 * dims, table.count), np.int64)
    wide[:BOX] = numbers[:BOX]
    boxes = wide[BOX:].reshape(3, dims, table.count)
    boxes[1] = 1
    boxes[:, : table.dims] = numbers[BOX:].reshape(3, table.dims, table.count)
    return wide


def spread(firsts: Numbers, counts: Numbers) -> Numbers:
    """The numbers ``firsts[i]`` to ``firsts[i] + counts[i] - 1``, for one i after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def _strides(shapes: Numbers) -> Numbers:
    strides = np.ones_like(shapes)
    for dim in range(len(shapes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * np.maximum(shapes[dim + 1], 1)
    return strides
