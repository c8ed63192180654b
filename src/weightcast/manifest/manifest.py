"""The manifest: the checkpoint tensors that a trainer publishes, by name, and their *image*.

The image is the virtual concatenation of all tensors in the order of their names, each starting at a multiple of 256 bytes. Nobody
has to hold it: it gives every byte of the model one position, which is what digests count in and what arenas are laid
out by. Gaps between tensors are zero bytes. As names alone decide the order, one content has one digest, whatever the order in which
a source lists its tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from weightcast.errors import InvalidInput
from weightcast.manifest.dtypes import DTYPE_NUMBERS, dtype_of, itemsize_of

MAX_DIMS = 64
"""Dimensions that a tensor can have, as in torch. The product of a million sizes takes minutes, and no other thread runs meanwhile."""
ALIGNMENT = 256
"""Bytes; every tensor of an image, an arena or a bucket starts at a multiple of it."""


def is_countable(shape: Sequence[int]) -> bool:
    """Whether sizes are none below zero, and strides over them are numbers of 64 bits, also where a tensor has no elements."""
    return all(size >= 0 for size in shape) and math.prod(max(size, 1) for size in shape) < 2**63


def align(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint tensor: its name, element type (wire name, see dtypes) and global shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInput("a tensor needs a name", field="name")
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise InvalidInput(f"the name {self.name!r} cannot be written as UTF-8", field="name") from None
        dtype_of(self.dtype)
        if len(self.shape) > MAX_DIMS:
            raise InvalidInput(f"{self.name}: {len(self.shape)} dimensions, more than {MAX_DIMS}", field="shape")
        if not is_countable(self.shape):
            raise InvalidInput(f"{self.name}: negative or too large a size in shape {self.shape}", field="shape")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize_of(self.dtype)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The checkpoint tensors of one model, sorted by name (by code points); names are unique. ``of`` sorts."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        for spec, following in itertools.pairwise(self.tensors):
            if spec.name == following.name:
                raise InvalidInput(f"tensor {spec.name!r} is listed twice", field="tensors")
            if spec.name > following.name:
                raise InvalidInput(
                    f"a manifest is sorted by name, {following.name!r} comes after {spec.name!r}",
                    field="tensors",
                    hint="Make it with Manifest.of",
                )

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> Manifest:
        """The manifest of tensors that come in any order."""
        return cls(tensors=tuple(sorted(tensors, key=lambda spec: spec.name)))

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.numbers

    def __getitem__(self, name: str) -> TensorSpec:
        return self.tensors[self.numbers[name]]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The place of each tensor in ``tensors``, by name."""
        return {spec.name: i for i, spec in enumerate(self.tensors)}

    @cached_property
    def num_dims(self) -> npt.NDArray[np.int64]:
        """How many dimensions each tensor has."""
        return np.array([len(spec.shape) for spec in self.tensors], np.int64)

    @cached_property
    def shapes(self) -> npt.NDArray[np.int64]:
        """The sizes of all tensors, a row for each dimension: 1 where a tensor has fewer dimensions than others."""
        dims = int(self.num_dims.max(initial=0))
        rows = [(*spec.shape, *(1,) * (dims - len(spec.shape))) for spec in self.tensors]
        return np.array(rows, np.int64).reshape(len(rows), dims).T.copy()

    @cached_property
    def dtype_numbers(self) -> npt.NDArray[np.int64]:
        """The number of each tensor's element type."""
        return np.array([DTYPE_NUMBERS[spec.dtype] for spec in self.tensors], np.int64)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Byte position of each tensor in the image."""
        positions, end = {}, 0
        for spec in self.tensors:
            positions[spec.name] = end
            end = align(end + spec.nbytes)
        return positions

    @cached_property
    def image_nbytes(self) -> int:
        """Size of the image, gaps included."""
        if not self.tensors:
            return 0
        last = self.tensors[-1]
        return align(self.positions[last.name] + last.nbytes)

    @cached_property
    def nbytes(self) -> int:
        """Sum of all tensors' bytes, gaps not included."""
        return sum(spec.nbytes for spec in self.tensors)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the model's form (names, dtypes, shapes); equal forms have equal digests."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()
