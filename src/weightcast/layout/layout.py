"""Layouts: which regions of checkpoint tensors a process holds (trainer) or wants (worker), and where in its memory.

A *region* is a box of a checkpoint tensor. A *placement* says where the box lies: storage number, offset and strides. A
holding and a landing are both placements; only the side differs. Storages are flat byte ranges, numbered per process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from weightcast.errors import InvalidInput
from weightcast.layout import geometry as geo
from weightcast.layout.geometry import contiguous_strides as contiguous_strides
from weightcast.manifest import ALIGNMENT, MAX_DIMS, Manifest, TensorSpec, align
from weightcast.manifest.dtypes import dtype_of, itemsize_of

PLACEMENTS_A_TENSOR = 256
"""Placements in one layout for each tensor of the manifest, on average: loaders cut a tensor into a few dozen at most."""
TIMES_A_TENSOR = 16
"""How often one worker may want a tensor; tied parameters want it twice."""


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A box of the checkpoint tensor ``name``: per dimension where it starts and how many elements it spans."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise InvalidInput(f"region of {self.name}: {len(self.offsets)} offsets, {len(self.sizes)} sizes")
        if len(self.sizes) > MAX_DIMS:
            raise InvalidInput(f"region of {self.name}: {len(self.sizes)} dimensions, more than {MAX_DIMS}")
        if any(value < 0 for value in self.offsets + self.sizes):
            raise InvalidInput(f"region of {self.name}: negative offsets {self.offsets} or sizes {self.sizes}")

    @classmethod
    def whole(cls, spec: TensorSpec) -> Region:
        return cls(name=spec.name, offsets=(0,) * len(spec.shape), sizes=spec.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def is_whole(self, spec: TensorSpec) -> bool:
        return self.sizes == spec.shape

    def intersect(self, other: Region) -> Region | None:
        """The common box of two regions of the same tensor, or None when they share no element."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for start, end in zip(offsets, ends, strict=True))
        if any(size <= 0 for size in sizes):
            return None
        return Region(name=self.name, offsets=offsets, sizes=sizes)


def overlap(regions: Iterable[Region]) -> bool:
    """Whether two of some regions of one tensor share an element.

    Regions are swept along the dimension in which most of them differ, so thousands of rows take no longer than they have to.
    """
    found = [region for region in regions if region.numel]
    if not found or not found[0].sizes:
        return len(found) > 1
    dim = max(range(len(found[0].sizes)), key=lambda d: len({region.offsets[d] for region in found}))
    found.sort(key=lambda region: region.offsets[dim])
    reached: list[Region] = []
    for region in found:
        reached = [other for other in reached if other.offsets[dim] + other.sizes[dim] > region.offsets[dim]]
        if any(region.intersect(other) is not None for other in reached):
            return True
        reached.append(region)
    return False


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where a region lies: ``storage`` number, ``offset`` and ``strides`` in elements of ``dtype``."""

    region: Region
    dtype: str
    storage: int
    offset: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        if len(self.strides) != len(self.region.sizes):
            raise InvalidInput(
                f"placement of {self.region.name}: strides {self.strides} do not fit {self.region.sizes}"
            )
        if self.storage < 0 or self.offset < 0 or any(stride < 0 for stride in self.strides):
            raise InvalidInput(f"placement of {self.region.name}: negative storage, offset or stride")

    @property
    def end_nbytes(self) -> int:
        """One past the last byte that the placement touches, from the start of its storage."""
        return (self.offset + geo.span(self.region.sizes, self.strides)) * itemsize_of(self.dtype)


def is_padded(placements: Iterable[Placement]) -> bool:
    """Whether each placement is contiguous and starts at a multiple of ALIGNMENT: fewer bytes than that between the end of one and
    the start of another belong to nobody then."""
    return all(
        placement.offset * itemsize_of(placement.dtype) % ALIGNMENT == 0
        and geo.is_contiguous(placement.region.sizes, placement.strides)
        for placement in placements
        if placement.region.numel
    )


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """All placements of one process over its storages (``storage_nbytes[i]`` is the size of storage i).

    ``through_loader`` names the tensors that have no direct landing and go through the engine's own loader.
    ``is_streamed``: the storages are windows of a stream, filled one after the other in the order of their numbers. They may share
    memory, so each holds its values only while its turn lasts.
    """

    placements: tuple[Placement, ...]
    storage_nbytes: tuple[int, ...]
    through_loader: tuple[str, ...] = ()
    is_streamed: bool = False

    def __post_init__(self) -> None:
        for placement in self.placements:
            if placement.storage >= len(self.storage_nbytes):
                raise InvalidInput(f"{placement.region.name}: storage {placement.storage} is not in the layout")
            if placement.end_nbytes > self.storage_nbytes[placement.storage]:
                raise InvalidInput(f"{placement.region.name}: reaches past the end of storage {placement.storage}")

    def check(self, manifest: Manifest) -> None:
        """Raise InvalidInput where a placement does not lie inside its checkpoint tensor."""
        for placement in self.placements:
            region = placement.region
            if region.name not in manifest:
                raise InvalidInput(f"the manifest has no tensor {region.name!r}", field="name")
            shape = manifest[region.name].shape
            if len(shape) != len(region.sizes) or any(
                start + size > limit for start, size, limit in zip(region.offsets, region.sizes, shape, strict=True)
            ):
                raise InvalidInput(f"{region.name}: region {region.offsets}+{region.sizes} is outside shape {shape}")


def most_placements(manifest: Manifest) -> int:
    """How many placements one worker may have."""
    return 4096 + PLACEMENTS_A_TENSOR * len(manifest)


def image_layout(manifest: Manifest, names: tuple[str, ...] | None = None) -> Layout:
    """Whole tensors (all, or ``names``) packed into one storage in manifest order, each 256-byte aligned."""
    wanted = None if names is None else set(names)
    placements, end = [], 0
    for spec in manifest.tensors:
        if wanted is not None and spec.name not in wanted:
            continue
        offset = end // itemsize_of(spec.dtype)
        strides = contiguous_strides(spec.shape)
        placements.append(
            Placement(region=Region.whole(spec), dtype=spec.dtype, storage=0, offset=offset, strides=strides)
        )
        end = align(end + spec.nbytes)
    return Layout(placements=tuple(placements), storage_nbytes=(end,))
