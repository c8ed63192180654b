"""Expected digests: what each worker's bytes must add up to, computed from the source in every round."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from weightcast.digest import LayoutDigest, combine, digest_region
from weightcast.dtypes import dtype_of
from weightcast.layout import Layout, Placement
from weightcast.manifest import Manifest
from weightcast.memory import Memory
from weightcast.plan import Copy


class ExpectedDigest:
    """The digest of the source's values in the regions and dtypes of some copies."""

    def __init__(self, manifest: Manifest, copies: Sequence[Copy], memory: Memory) -> None:
        self._manifest = manifest
        self._casts = [copy for copy in copies if copy.src_dtype != copy.dst_dtype]
        held = tuple(_source_side(copy) for copy in copies if copy.src_dtype == copy.dst_dtype)
        layout = Layout(placements=held, storage_nbytes=tuple(s.numel() for s in memory.storages))
        self._plain = LayoutDigest(manifest, layout, gaps_are_zero=memory.is_arena)

    def of(self, memory: Memory) -> int:
        return combine([self._plain.of(memory), *(self._of_cast(memory, copy) for copy in self._casts)])

    def _of_cast(self, memory: Memory, copy: Copy) -> int:
        held = _source_side(copy)
        values = memory.view(held.storage, held.dtype, held.offset, held.region.sizes, held.strides)
        return digest_region(values.to(dtype_of(copy.dst_dtype)), self._manifest, held)


def copies_key(copies: Sequence[Copy]) -> str:
    """Equal for sets of copies with equal expected digests: workers that want the same share one computation."""
    wanted = [(copy.region, copy.src_storage, copy.src_offset, copy.src_strides, copy.dst_dtype) for copy in copies]
    return hashlib.sha256(msgspec.msgpack.encode(wanted)).hexdigest()


def _source_side(copy: Copy) -> Placement:
    return Placement(
        region=copy.region,
        dtype=copy.src_dtype,
        storage=copy.src_storage,
        offset=copy.src_offset,
        strides=copy.src_strides,
    )


def whole_copies(manifest: Manifest, layout: Layout) -> list[Copy]:
    """Copies that stand for everything that is published, in the manifest's dtypes: their digest is the content's."""
    return [
        Copy(
            region=held.region,
            src_storage=held.storage,
            src_dtype=held.dtype,
            src_offset=held.offset,
            src_strides=held.strides,
            dst_storage=0,
            dst_dtype=manifest[held.region.name].dtype,
            dst_offset=0,
            dst_strides=held.strides,
        )
        for held in layout.placements
    ]
