"""Plans as tables: a row for each copy. Whoever carries a plan out reads rows as ``Copy``; nobody else makes objects of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias, overload

import msgspec
import numpy as np
import numpy.typing as npt

from weightcast.errors import InvalidInput
from weightcast.layout import Region
from weightcast.layout.columns import Numbers, pack, unpack
from weightcast.layout.table import Count, Dims
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import DTYPE_NAMES, DTYPE_NUMBERS
from weightcast.plan.holdings import HoldingTable
from weightcast.plan.plan import Copy

TENSOR, PART, IS_WHOLE, VIA, SRC_STORAGE, SRC_DTYPE, SRC_OFFSET, DST_STORAGE, DST_DTYPE, DST_OFFSET, BOX = range(11)
"""Columns of a table of copies. VIA is 0 for none, else the type's number and one. From BOX on: offsets in the tensor, sizes,
strides at the source, strides at the destination, each by dimension."""
Indices: TypeAlias = npt.NDArray[np.signedinteger[Any]]
Rows: TypeAlias = Indices | slice
KEY_COLUMNS = (TENSOR, SRC_STORAGE, SRC_OFFSET, VIA, DST_DTYPE)
"""With a region and the strides at the source: what the values of a copy depend on."""


class CopyColumns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies on the wire, of one manifest's tensors."""

    count: Count
    dims: Dims
    columns: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if len(self.columns) != BOX + 4 * self.dims:
            raise InvalidInput(f"{len(self.columns)} columns for copies of {self.dims} dimensions")

    @classmethod
    def of(cls, copies: Sequence[Copy], manifest: Manifest) -> CopyColumns:
        """The columns of some copies of the manifest's tensors."""
        numbers = copies.numbers() if isinstance(copies, CopyTable) else _numbers(copies, manifest)
        return cls(count=numbers.shape[1], dims=(len(numbers) - BOX) // 4, columns=pack(numbers))

    def copies(self, manifest: Manifest) -> CopyTable:
        """The copies, of tensors of a manifest."""
        numbers = unpack(self.columns, self.count)
        return CopyTable(manifest, self.count, lambda: numbers)


class CopyTable(Sequence[Copy]):
    """Copies of a manifest's tensors. They are made when they are first looked at, and kept."""

    def __init__(self, manifest: Manifest, count: int, make: Callable[[], Numbers]) -> None:
        self._manifest, self._count, self.numbers = manifest, count, make
        self._made: tuple[Copy, ...] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Copy: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Copy, ...]: ...
    def __getitem__(self, index: int | slice) -> Copy | tuple[Copy, ...]:
        return self._copies[index]

    def __iter__(self) -> Iterator[Copy]:
        return iter(self._copies)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._copies == tuple(other)

    def __hash__(self) -> int:
        return hash(self._copies)

    @property
    def _copies(self) -> tuple[Copy, ...]:
        if self._made is None:
            self._made = tuple(_copies(self._manifest, self.numbers()))
        return self._made


def _copies(manifest: Manifest, numbers: Numbers) -> Iterator[Copy]:
    """The rows as copies."""
    dims = (len(numbers) - BOX) // 4
    dtypes, vias = DTYPE_NAMES, ("", *DTYPE_NAMES)
    for (
        tensor,
        part,
        is_whole,
        via,
        src_storage,
        src_dtype,
        src_offset,
        dst_storage,
        dst_dtype,
        dst_offset,
        *box,
    ) in numbers.T.tolist():
        spec = manifest.tensors[tensor]
        own = len(spec.shape)
        offsets, sizes, src_strides, dst_strides = (tuple(box[kind * dims : kind * dims + own]) for kind in range(4))
        yield Copy(
            region=Region(name=spec.name, offsets=offsets, sizes=sizes),
            src_storage=src_storage,
            src_dtype=dtypes[src_dtype],
            src_offset=src_offset,
            src_strides=src_strides,
            dst_storage=dst_storage,
            dst_dtype=dtypes[dst_dtype],
            dst_offset=dst_offset,
            dst_strides=dst_strides,
            via=vias[via],
            is_whole=bool(is_whole),
            part=part,
        )


def _numbers(copies: Sequence[Copy], manifest: Manifest) -> Numbers:
    """The copies as rows."""
    dims = max((len(copy.sizes) for copy in copies), default=0)
    padding = [((0,) * n, (1,) * n) for n in range(dims, -1, -1)]  # by the number of dimensions
    rows = []
    for c in copies:
        zeros, ones = padding[len(c.sizes)]
        via = DTYPE_NUMBERS[c.via] + 1 if c.via else 0
        head = (manifest.numbers[c.region.name], c.part, c.is_whole, via)
        source = (c.src_storage, DTYPE_NUMBERS[c.src_dtype], c.src_offset)
        target = (c.dst_storage, DTYPE_NUMBERS[c.dst_dtype], c.dst_offset)
        box = (*c.region.offsets, *zeros, *c.sizes, *ones, *c.src_strides, *zeros, *c.dst_strides, *zeros)
        rows.append((*head, *source, *target, *box))
    return np.array(rows, np.int64).reshape(len(rows), BOX + 4 * dims).T


class Plan(Mapping[int, Sequence[Copy]]):
    """Copies of one worker by trainer rank, each in manifest order."""

    def __init__(
        self,
        manifest: Manifest,
        ranks: Numbers,
        make: Callable[[Rows], Numbers],
        meet: Callable[[], HoldingTable],
    ) -> None:
        """``ranks`` are those of the rows; ``make`` gives the numbers of some rows, ``meet`` what ``holdings`` is."""
        self._manifest, self._ranks, self._make, self._meet = manifest, ranks, make, meet
        order = np.argsort(ranks, kind="stable").astype(np.int32)
        ordered = ranks[order]
        firsts = np.flatnonzero(np.diff(ordered, prepend=-1))
        bounds = itertools.pairwise([*firsts.tolist(), len(ranks)])
        self._of = {
            rank: CopyTable(manifest, end - start, partial(make, order[start:end]))
            for rank, (start, end) in zip(ordered[firsts].tolist(), bounds, strict=True)
        }

    def __getitem__(self, rank: int) -> Sequence[Copy]:
        return self._of[rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def rows(self) -> tuple[Numbers, Numbers]:
        """The rank of each copy and the numbers of each, made anew by each call."""
        return self._ranks, self._make(slice(None))

    @property
    def digest(self) -> str:
        """Hex SHA-256, equal on both sides exactly when they compiled the same copies."""
        return self._digests[0]

    @property
    def key(self) -> str:
        """Hex SHA-256, equal for plans whose values have equal digests: workers that want the same share one computation."""
        return self._digests[1]

    @cached_property
    def holdings(self) -> HoldingTable:
        """All that trainer ranks hold of the boxes that are copied from: what the plan is compiled from on the other side."""
        return self._meet()

    @cached_property
    def _digests(self) -> tuple[str, str]:
        return _digests(self._manifest, self._ranks, self._make(slice(None)))

    def as_of(self, manifest: Manifest) -> Plan:
        """The same copies as those of the only tensor of another manifest."""

        def make(rows: Rows) -> Numbers:
            numbers = self._make(rows)
            numbers[TENSOR] = 0
            return numbers

        return Plan(manifest, self._ranks, make, self._meet)


def _digests(manifest: Manifest, ranks: Numbers, numbers: Numbers) -> tuple[str, str]:
    """Of a plan, and of what its values depend on."""
    dims = (len(numbers) - BOX) // 4
    columns = (*pack(ranks[None]), *pack(numbers))
    of_values = {0, *(1 + n for n in KEY_COLUMNS), *range(1 + BOX, 1 + BOX + 3 * dims)}
    start = f"{manifest.digest} {len(ranks)} {dims}".encode()
    key = hashlib.sha256(start)
    for number, column in enumerate(columns):
        if number in of_values:
            key.update(column)
    whole = key.copy()
    for number, column in enumerate(columns):
        if number not in of_values:
            whole.update(column)
    return whole.hexdigest(), key.hexdigest()
