"""Which bytes a digest is taken of: runs and strided boxes of a memory, each with its place in the image. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from weightcast.layout import Placement
from weightcast.layout import geometry as geo
from weightcast.manifest import ALIGNMENT, Manifest
from weightcast.manifest.dtypes import dtype_of


class DigestRun:
    """Contiguous bytes of a memory that are contiguous in the image as well."""

    __slots__ = ("is_whole", "nbytes", "offset", "position", "storage")

    def __init__(self, storage: int, offset: int, position: int, nbytes: int, is_whole: bool = False) -> None:
        self.storage, self.offset, self.position, self.nbytes = storage, offset, position, nbytes
        self.is_whole = is_whole


class StridedBox(NamedTuple):
    """Elements of a box: storage and byte offset of the first, its byte position in the image, sizes, and strides (in
    elements) in memory and in the image."""

    storage: int
    offset: int
    position: int
    itemsize: int
    sizes: tuple[int, ...]
    memory_strides: tuple[int, ...]
    image_strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.sizes) * self.itemsize


def run_of(placement: Placement, manifest: Manifest) -> DigestRun | None:
    """The placement as one run, or None where it is not contiguous in memory and in the image."""
    spec = manifest[placement.region.name]
    sizes, itemsize = placement.region.sizes, dtype_of(placement.dtype).itemsize
    # Contiguous in the image: only the outermost dimension of more than one element may be cut.
    inner = next((d for d, size in enumerate(sizes) if size > 1), len(sizes))
    if sizes[inner + 1 :] != spec.shape[inner + 1 :]:
        return None
    if not geo.is_contiguous(sizes, placement.strides):
        return None
    start = geo.offset_of(placement.region.offsets, geo.contiguous_strides(spec.shape))
    position = manifest.positions[spec.name] + start * itemsize
    nbytes, is_whole = placement.region.numel * itemsize, placement.region.is_whole(spec)
    return DigestRun(placement.storage, placement.offset * itemsize, position, nbytes, is_whole)


def box_of(placement: Placement, manifest: Manifest) -> StridedBox:
    """The placement as a box, however it lies."""
    region, itemsize = placement.region, dtype_of(placement.dtype).itemsize
    strides = geo.contiguous_strides(manifest[region.name].shape)
    start = geo.offset_of(region.offsets, strides)
    return StridedBox(
        storage=placement.storage,
        offset=placement.offset * itemsize,
        position=manifest.positions[region.name] + start * itemsize,
        itemsize=itemsize,
        sizes=region.sizes,
        memory_strides=placement.strides,
        image_strides=strides,
    )


def joined(runs: Sequence[DigestRun], *, across_padding: bool) -> list[DigestRun]:
    """Runs that continue in memory and in the image, as one each; also over the padding behind whole tensors if asked."""
    # So near to the end of a tensor only the start of the next one is aligned.
    found = geo.joined(
        (
            geo.Run(
                (run.storage,),
                (run.offset, run.position),
                run.nbytes,
                ALIGNMENT - 1 if across_padding and run.is_whole else 0,
            )
            for run in runs
        ),
        alignment=ALIGNMENT,
    )
    return [DigestRun(storage, offset, position, nbytes) for (storage,), (offset, position), nbytes, _ in found]
