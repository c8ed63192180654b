"""Counted: how changes of a bucket's values change the digest of what the bucket lands as. In memory of the host, with kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from weightcast.cpu import changing_for
from weightcast.delta import Form, Kind
from weightcast.delta.changes import Bits
from weightcast.delta.form import UNSIGNED
from weightcast.digest.formula import word_weights
from weightcast.digest.regions import box_of
from weightcast.layout import geometry as geo
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import dtype_of
from weightcast.plan import landing_of
from weightcast.transports.buckets import Bucket

if TYPE_CHECKING:
    from weightcast.cpu.changing import Stretches

Elements = npt.NDArray[np.int64]


class Sums(NamedTuple):
    """Digests of elements as they were and as they are. ``told``: of those as they were whose changes are told as differences."""

    before: int = 0
    after: int = 0
    told: int = 0

    @property
    def change(self) -> int:
        """What was added to the digest of all."""
        return self.after - self.before

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


class Counted:
    """Where the values of one bucket count in the digest, in the types in which they land."""

    def __init__(self, bucket: Bucket, form: Form, manifest: Manifest, kernels: ModuleType) -> None:
        self.kernels, self._form = kernels, form
        self.weights = word_weights(torch.device("cpu")).numpy()
        self.boxes = [box_of(landing_of(piece.copy), manifest) for piece in bucket.pieces]
        self._types = [(dtype_of(piece.dtype), dtype_of(piece.copy.dst_dtype)) for piece in bucket.pieces]
        self._stretches: dict[Kind, Stretches] = {kind: self._table(kind) for kind in form.kinds}

    def stretches(self, kind: Kind) -> Stretches:
        """Those of one kind, for kernels."""
        return self._stretches[kind]

    def _table(self, kind: Kind) -> Stretches:
        of = [self.boxes[number] for number in self._form.of_kind[kind]]
        shapes = [geo.collapse(box.sizes, box.image_strides, box.memory_strides) for box in of]
        sizes = [sizes or (1,) for sizes, _ in shapes]
        image, target = ([strides[at] or (1,) for _, strides in shapes] for at in range(2))
        widest = max(map(len, sizes))
        return self.kernels.Stretches(  # type: ignore[no-any-return]
            self._form.starts[kind],
            self._form.ends[kind],
            np.array([box.position for box in of], np.int64),
            np.array(list(map(len, sizes)), np.int64),
            *(_padded(rows, widest) for rows in (sizes, image, target)),
        )

    def digest_of(self, number: int, elements: Elements, bits: Bits) -> int:
        """The digest of elements of a piece, counted row by row, with these bits in the type in which they land."""
        box, offsets = self.boxes[number], np.zeros(len(elements), np.int64)
        rest = elements
        for size, stride in zip(reversed(box.sizes), reversed(box.image_strides), strict=True):
            rest, index = np.divmod(rest, size)
            offsets += index * stride
        positions = box.position + offsets * box.itemsize
        return int(self.kernels.digest_of(bits.astype(np.uint64), positions, self.weights))

    def landed(self, number: int, bits: Bits) -> Bits:
        """The bits of a piece's values in the type in which they land."""
        travels, lands = self._types[number]
        if travels == lands:
            return bits
        given = torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8).copy()).view(travels)
        return given.to(lands).view(torch.uint8).numpy().view(UNSIGNED[lands.itemsize])


def _padded(rows: Sequence[Sequence[int]], width: int) -> Elements:
    table = np.ones((len(rows), width), np.int64)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def counted(buckets: Sequence[Bucket], forms: Sequence[Form], manifest: Manifest) -> list[Counted] | None:
    """One for each bucket; None where kernels are not there, or not worth loading."""
    kernels = changing_for(sum(form.nbytes for form in forms))
    if kernels is None:
        return None
    return [Counted(bucket, form, manifest, kernels) for bucket, form in zip(buckets, forms, strict=True)]
