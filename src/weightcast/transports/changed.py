"""Changed: how changes of a bucket's values get to the places where these values landed, in time that goes by the number of changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from weightcast.delta import Changes, Form
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import dtype_of, itemsize_of
from weightcast.plan import Copy
from weightcast.transports.buckets import Bucket, out_of_bucket

_SIGNED = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
"""By bytes of an element: types with which torch adds modulo their size."""


class Changing:
    """Applies changes of one bucket to a memory that holds the bucket's former values. The memory is kept alive."""

    def __init__(self, bucket: Bucket, form: Form, memory: Memory) -> None:
        self._form, self._memory = form, memory
        self._copies = [out_of_bucket(piece) for piece in bucket.pieces]

    @torch.no_grad()
    def apply(self, several: Sequence[Changes]) -> None:
        """Apply changes that ``decode`` has read for this form. On a GPU the work is queued on the current stream."""
        for changes in several:
            starts, ends = self._form.starts[changes.kind], self._form.ends[changes.kind]
            lows, highs = np.searchsorted(changes.positions, starts), np.searchsorted(changes.positions, ends)
            for at in np.flatnonzero(highs > lows).tolist():
                part = slice(int(lows[at]), int(highs[at]))
                copy = self._copies[self._form.of_kind[changes.kind][at]]
                values = torch.from_numpy(_writeable(changes.values[part]))
                self._write(copy, changes.positions[part] - starts[at], values, is_absolute=changes.kind.is_absolute)

    def _write(self, copy: Copy, elements: npt.NDArray[np.int64], values: torch.Tensor, *, is_absolute: bool) -> None:
        itemsize, flat = itemsize_of(copy.dst_dtype), self._memory.storages[copy.dst_storage]
        target = self._memory.view(copy.dst_storage, _SIGNED[itemsize], 0, (flat.numel() // itemsize,), (1,))
        where = torch.from_numpy(_offsets(copy, elements)).to(flat.device)
        bits = values.view(dtype_of(_SIGNED[values.itemsize])).to(flat.device)
        if copy.src_dtype != copy.dst_dtype:
            cast = bits.view(dtype_of(copy.src_dtype)).to(dtype_of(copy.dst_dtype))
            target[where] = cast.view(target.dtype)
        elif is_absolute:
            target[where] = bits
        else:
            target[where] += bits


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
