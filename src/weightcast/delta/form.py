"""Form: which bytes of an image are values, and of how many bytes each is. Both sides of a pair make it from the same plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
UNSIGNED: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By bytes of an element: changes are changes of bits, whatever the bits mean."""


class Kind(NamedTuple):
    """What is written in one stream: values of one size, as differences to what was there, or as they are."""

    itemsize: int
    is_absolute: bool


class Stretch(NamedTuple):
    """Values that lie one after the other in the image; ``offset`` and ``nbytes`` are multiples of an element."""

    offset: int
    nbytes: int
    kind: Kind

    @property
    def start(self) -> int:
        """The number of the first element, counted in elements from the image's start."""
        return self.offset // self.kind.itemsize

    @property
    def numel(self) -> int:
        """Elements."""
        return self.nbytes // self.kind.itemsize


class Form:
    """The stretches of an image, in the order of their offsets, and by kind."""

    def __init__(self, stretches: Sequence[Stretch], nbytes: int) -> None:
        self.stretches, self.nbytes = tuple(stretches), nbytes
        self.of_kind: dict[Kind, list[int]] = {}
        for number, stretch in enumerate(self.stretches):
            self.of_kind.setdefault(stretch.kind, []).append(number)
        self.kinds = sorted(self.of_kind)
        self.starts = {kind: self._column(kind, [self.stretches[n].start for n in of]) for kind, of in self._kinds()}
        """The first elements of each kind's stretches."""
        self.ends = {
            kind: self._column(kind, [self.stretches[n].start + self.stretches[n].numel for n in of])
            for kind, of in self._kinds()
        }
        """One past the last elements."""
        self.numel = {kind: sum(self.stretches[n].numel for n in of) for kind, of in self._kinds()}

    def _kinds(self) -> list[tuple[Kind, list[int]]]:
        return [(kind, self.of_kind[kind]) for kind in self.kinds]

    @staticmethod
    def _column(kind: Kind, numbers: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.array(numbers, np.int64)
