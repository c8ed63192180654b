"""Layouts as tables: a row for each placement, for the wire and for planning. A placement's tensor is its number in a manifest.

Tensors have as many columns for dimensions as the one with most of them; where a tensor has fewer, the rest are offset 0, size 1,
stride 0. Tables that a peer sent are good once ``check`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from weightcast.errors import InvalidInput
from weightcast.layout.columns import Numbers, pack, unpack
from weightcast.layout.layout import TIMES_A_TENSOR, Layout, Placement, Region, most_placements
from weightcast.manifest import MAX_DIMS, Manifest
from weightcast.manifest.dtypes import DTYPE_NAMES, DTYPE_NUMBERS, ITEMSIZES
from weightcast.manifest.names import number_of

TENSOR, DTYPE, STORAGE, OFFSET, BOX = range(5)
"""Columns of a table of placements. From BOX on: offsets in the tensor, sizes, strides, each by dimension."""
MOST_BYTES = 2.0**62

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Dims = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMS)]


class PlacementTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Placements in columns (see TENSOR to BOX)."""

    count: Count
    dims: Dims
    columns: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.columns) != BOX + 3 * self.dims:
            raise InvalidInput(f"{len(self.columns)} columns for {self.dims} dimensions")

    @classmethod
    def packed(cls, numbers: Numbers, dims: int) -> PlacementTable:
        return cls(count=numbers.shape[1], dims=dims, columns=pack(numbers))

    @classmethod
    def of(cls, placements: Sequence[Placement], manifest: Manifest) -> PlacementTable:
        """The table of placements of the manifest's tensors."""
        dims = max((len(p.strides) for p in placements), default=0)
        padding = [((0,) * n, (1,) * n, (0,) * n) for n in range(dims, -1, -1)]  # by the number of dimensions
        strangers = {p.region.name for p in placements} - manifest.numbers.keys()
        if strangers:
            raise InvalidInput(f"the manifest has no tensor {min(strangers)!r}", field="name")
        rows = []
        for p in placements:
            region = p.region
            offsets, sizes, strides = padding[len(p.strides)]
            numbers = (manifest.numbers[region.name], DTYPE_NUMBERS[p.dtype], p.storage, p.offset)
            rows.append((*numbers, *region.offsets, *offsets, *region.sizes, *sizes, *p.strides, *strides))
        return cls.packed(np.array(rows, np.int64).reshape(len(rows), BOX + 3 * dims).T, dims)

    def numbers(self) -> Numbers:
        """The table; made anew by each call."""
        return unpack(self.columns, self.count)

    def check(self, manifest: Manifest, storage_nbytes: Numbers | None = None) -> None:
        """Raise InvalidInput where a placement does not lie inside its tensor, or inside its storage."""
        numbers, dims = self.numbers(), self.dims
        tensor, dtype, storage, offset = numbers[:BOX]
        if bool((tensor >= len(manifest)).any()):
            raise InvalidInput("the manifest has not as many tensors", field="name")
        offsets, sizes, strides = numbers[BOX:].reshape(3, dims, self.count)
        own_dims = manifest.num_dims[tensor]
        if bool((own_dims > dims).any()) or dims > len(manifest.shapes):
            raise InvalidInput("the manifest's tensors have another number of dimensions")
        shape = manifest.shapes[:dims, tensor]
        is_padding = np.arange(dims)[:, None] >= own_dims
        wrong = (sizes > shape) | (offsets > shape - sizes) | (is_padding & ((sizes != 1) | (strides != 0)))
        _refuse(wrong.any(axis=0), manifest, tensor, "a region that is outside of the tensor's shape")
        _refuse(dtype >= len(DTYPE_NAMES), manifest, tensor, "an unknown dtype")
        itemsize = ITEMSIZES[dtype]
        reach = np.maximum(sizes - 1, 0)
        rough = (offset + (reach * strides.astype(float)).sum(axis=0)) * itemsize
        _refuse(rough > MOST_BYTES, manifest, tensor, "a place past the end of any storage")
        if storage_nbytes is not None:
            _refuse(storage >= len(storage_nbytes), manifest, tensor, "a storage that is not in the layout")
            past_last = offset + ((reach * strides).sum(axis=0) + 1) * sizes.all(axis=0)
            too_far = past_last * itemsize > storage_nbytes[storage]
            _refuse(too_far, manifest, tensor, "a place past the end of its storage")

    def shares(self, manifest: Manifest) -> npt.NDArray[np.float64]:
        """How much of each tensor of the manifest all rows together are, as parts of its elements."""
        numbers = self.numbers()
        sizes = numbers[BOX + self.dims : BOX + 2 * self.dims].astype(float).prod(axis=0)
        wanted = np.bincount(numbers[TENSOR], sizes, len(manifest))
        return np.asarray(wanted / np.maximum(manifest.shapes.prod(axis=0, dtype=float), 1.0), float)

    def placements(self, manifest: Manifest) -> Iterator[Placement]:
        """The rows as placements."""
        dims = self.dims
        for tensor, dtype, storage, offset, *box in self.numbers().T.tolist():
            spec = manifest.tensors[tensor]
            own = len(spec.shape)
            offsets, sizes, strides = (tuple(box[kind * dims : kind * dims + own]) for kind in range(3))
            region = Region(name=spec.name, offsets=offsets, sizes=sizes)
            yield Placement(region=region, dtype=DTYPE_NAMES[dtype], storage=storage, offset=offset, strides=strides)


def _refuse(wrong: npt.NDArray[np.bool_], manifest: Manifest, tensor: Numbers, what: str) -> None:
    if bool(wrong.any()):
        raise InvalidInput(f"{manifest.tensors[int(tensor[np.argmax(wrong)])].name}: {what}")


class LayoutTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Layout of a manifest's tensors, as a table."""

    placements: PlacementTable
    num_storages: Count
    storage_nbytes: bytes
    """A column."""
    through_loader: tuple[str, ...] = ()
    is_streamed: bool = False

    @classmethod
    def of(cls, layout: Layout, manifest: Manifest) -> LayoutTable:
        return cls(
            placements=PlacementTable.of(layout.placements, manifest),
            num_storages=len(layout.storage_nbytes),
            storage_nbytes=pack(np.array([layout.storage_nbytes], np.int64))[0],
            through_loader=layout.through_loader,
            is_streamed=layout.is_streamed,
        )

    def of_manifest(self, manifest: Manifest, other: Manifest) -> LayoutTable:
        """The same layout, whose tensors are called by their numbers in another manifest."""
        numbers = self.placements.numbers()
        places = np.array([other.numbers[spec.name] for spec in manifest.tensors], np.int64)
        numbers[TENSOR] = places[numbers[TENSOR]]
        return msgspec.structs.replace(self, placements=PlacementTable.packed(numbers, self.placements.dims))

    def layout(self, manifest: Manifest) -> Layout:
        """The layout that this is the table of."""
        return Layout(
            placements=tuple(self.placements.placements(manifest)),
            storage_nbytes=tuple(self._sizes().tolist()),
            through_loader=self.through_loader,
            is_streamed=self.is_streamed,
        )

    def _sizes(self) -> Numbers:
        (sizes,) = unpack([self.storage_nbytes], self.num_storages)
        return np.asarray(sizes, np.int64)

    def check(self, manifest: Manifest) -> None:
        """Raise InvalidInput where a placement does not lie inside its checkpoint tensor, or inside its storage."""
        self.placements.check(manifest, self._sizes())

    def check_landings(self, manifest: Manifest) -> None:
        """``check``, and raise InvalidInput for landings that no loader leaves behind, before anything is computed from them.

        Planning takes time and memory by the number of placements, which a worker tells.
        """
        table, most = self.placements, most_placements(manifest)
        if table.count > most or table.dims > len(manifest.shapes):
            raise InvalidInput(
                f"{table.count} placements of {number_of(len(manifest), 'tensor')}; at most {most} are taken"
            )
        strangers = [name for name in self.through_loader if name not in manifest]
        if strangers or len(self.through_loader) > len(manifest):
            raise InvalidInput(
                f"{number_of(len(self.through_loader), 'tensor')} through the loader, of {len(manifest)}"
            )
        self.check(manifest)
        wanted = table.shares(manifest)
        if bool((wanted > TIMES_A_TENSOR).any()):
            name = manifest.tensors[int(np.argmax(wanted))].name
            raise InvalidInput(f"{name} is wanted more than {TIMES_A_TENSOR} times by one worker")
