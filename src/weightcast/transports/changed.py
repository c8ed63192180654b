"""Changed: how changes of a bucket's values get to the places where these values landed, in time that goes by the number of changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightcast.delta import Changes, Form, Part, changes_of, parts_of
from weightcast.delta.form import UNSIGNED, Kind
from weightcast.digest.formula import MASK
from weightcast.errors import ProtocolError
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import dtype_of, itemsize_of
from weightcast.plan import Copy
from weightcast.transports.buckets import Bucket, out_of_bucket
from weightcast.transports.counted import Counted, Sums
from weightcast.transports.told import Told

_SIGNED = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
"""By bytes of an element: types with which torch adds modulo their size."""


class Read(NamedTuple):
    """Changes that were read, and the digest that the places of differences have to have before, where that is known."""

    changes: Sequence[Part | Changes]
    before: int | None


class Changing:
    """Applies changes of one bucket to a memory that holds the bucket's former values. The memory is kept alive.

    In memory of the host, with kernels (``counted``), it also says what became of the digest of what landed there: it reads each
    element before it is written, and again afterwards.
    """

    def __init__(
        self, bucket: Bucket, form: Form, memory: Memory, counted: Counted | None = None, shared: Set[int] = frozenset()
    ) -> None:
        """``shared``: pieces, by number, whose places others write, too."""
        self._form, self._memory = form, memory
        self._copies = [out_of_bucket(piece) for piece in bucket.pieces]
        is_on_host = memory.gpu is None and not any(storage.is_cuda for storage in memory.storages)
        self._counted = counted if is_on_host else None
        self._targets = {} if self._counted is None else _targets(self._counted, form, memory)
        self._shared = shared

    def read(self, told: Told) -> Read:
        """Changes of the form, checked as ``decode`` checks them. Nothing is written."""
        return Read([self._checked(part) for part in parts_of(self._form, told.data)], told.before)

    def _checked(self, part: Part) -> Part | Changes:
        counted = self._counted
        if counted is None or part.is_whole or part.kind.is_absolute:
            return changes_of(self._form, part)
        part = part._replace(wide_gaps=part.wide_gaps.astype(np.int64), wide_values=part.wide_values.astype(np.uint64))
        gaps, values = part.gaps, part.values
        stretches = counted.stretches(part.kind)
        if not counted.kernels.is_inside(gaps, part.wide_gaps, values, len(part.wide_values), stretches):
            raise ProtocolError("malformed changes: a place outside of the values, or other wide numbers than it says")
        return part

    def apply(self, several: Sequence[Read], run: Callable[[Callable[[], object]], None]) -> Sums | None:
        """Apply what was read, one after the other; ``run`` calls what it is given where the memory lies. None where digests cannot be
        told. ProtocolError, once it is written, where memory did not have what differences are told against."""
        total: Sums | None = Sums()
        for each in several:
            found: list[Sums | None] = []
            run(partial(self._note, each.changes, found))
            (sums,) = found
            if sums is not None and each.before is not None and each.before != sums.told & MASK:
                raise ProtocolError("changes came for values that are not those of the round before")
            total = None if total is None or sums is None else total.plus(sums)
        return total

    @torch.no_grad()
    def _note(self, changes: Sequence[Part | Changes], found: list[Sums | None]) -> None:
        sums: Sums | None = Sums()
        for one in changes:
            some = self._add(self._counted, one) if isinstance(one, Part) and self._counted else self._apply(one)  # type: ignore[arg-type]
            sums = None if sums is None or some is None else sums.plus(some)
        found.append(sums)

    def _add(self, counted: Counted, part: Part) -> Sums:
        """Differences, in one pass."""
        sums, kind = np.zeros(2, np.int64), part.kind
        given = (part.gaps, part.wide_gaps, part.values, part.wide_values)
        counted.kernels.apply(
            *given, self._targets[kind], counted.stretches(kind), kind.itemsize, counted.weights, sums
        )
        before, after = sums.tolist()
        return Sums(before, after, before)

    def _apply(self, changes: Changes) -> Sums | None:
        sums: Sums | None = Sums()
        starts, ends = self._form.starts[changes.kind], self._form.ends[changes.kind]
        lows, highs = np.searchsorted(changes.positions, starts), np.searchsorted(changes.positions, ends)
        for at in np.flatnonzero(highs > lows).tolist():
            part = slice(int(lows[at]), int(highs[at]))
            number, elements = self._form.of_kind[changes.kind][at], changes.positions[part] - starts[at]
            values = torch.from_numpy(_writeable(changes.values[part]))
            target, where = self._place(self._copies[number], elements)
            before = self._digest_of(number, elements, target, where)
            self._write(self._copies[number], target, where, values, is_absolute=changes.kind.is_absolute)
            after = self._digest_of(number, elements, target, where)
            if sums is None or before is None or after is None:
                sums = None
            else:
                sums = sums.plus(Sums(before, after, 0 if changes.kind.is_absolute else before))
        return sums

    def _digest_of(
        self, number: int, elements: npt.NDArray[np.int64], target: torch.Tensor, where: torch.Tensor
    ) -> int | None:
        """That of what lies there now; None where another piece's values lie there, too, whose digest changes with it."""
        if self._counted is None or number in self._shared:
            return None
        return self._counted.digest_of(
            number, elements, target[where].view(torch.uint8).numpy().view(UNSIGNED[target.itemsize])
        )

    def _place(self, copy: Copy, elements: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """All elements of the storage in which a copy's values land, and where in it some of them lie."""
        itemsize, flat = itemsize_of(copy.dst_dtype), self._memory.storages[copy.dst_storage]
        target = self._memory.view(copy.dst_storage, _SIGNED[itemsize], 0, (flat.numel() // itemsize,), (1,))
        return target, torch.from_numpy(_offsets(copy, elements)).to(flat.device)

    def _write(
        self, copy: Copy, target: torch.Tensor, where: torch.Tensor, values: torch.Tensor, *, is_absolute: bool
    ) -> None:
        bits = values.view(dtype_of(_SIGNED[values.itemsize])).to(target.device)
        if copy.src_dtype != copy.dst_dtype:
            cast = bits.view(dtype_of(copy.src_dtype)).to(dtype_of(copy.dst_dtype))
            target[where] = cast.view(target.dtype)
        elif is_absolute:
            target[where] = bits
        else:
            target[where] += bits


def _targets(counted: Counted, form: Form, memory: Memory) -> dict[Kind, npt.NDArray[np.int64]]:
    """Where the first elements of each kind's stretches landed."""
    addresses = [storage.data_ptr() for storage in memory.storages]
    boxes = {kind: [counted.boxes[number] for number in of] for kind, of in form.of_kind.items()}
    return {
        kind: np.array([addresses[box.storage] + box.offset for box in some], np.int64) for kind, some in boxes.items()
    }


def _writeable(values: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    return values if values.flags.writeable else values.copy()


def _offsets(copy: Copy, elements: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where elements of a copy lie in their storage; elements are counted row by row."""
    if geo.is_contiguous(copy.sizes, copy.dst_strides):
        return elements + copy.dst_offset
    sizes, (strides,) = geo.collapse(copy.sizes, copy.dst_strides)
    found, rest = np.full_like(elements, copy.dst_offset), elements
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        rest, index = np.divmod(rest, size)
        found += index * stride
    return found
