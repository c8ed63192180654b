"""The loader's area: where whole tensors wait for the engine's own loader, and where those stay that went through it last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import torch

from weightcast.layout import Layout, contiguous_strides, image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest

TensorPairs = Iterator[tuple[str, torch.Tensor]]


def with_area(layout: Layout, manifest: Manifest) -> Layout:
    """The engine's landings plus one storage, the last one, in which whole tensors wait for the engine's loader."""
    if not layout.through_loader:
        return layout
    area = image_layout(manifest, layout.through_loader)
    number = len(layout.storage_nbytes)
    moved = tuple(msgspec.structs.replace(placement, storage=number) for placement in area.placements)
    return msgspec.structs.replace(
        layout,
        placements=layout.placements + moved,
        storage_nbytes=layout.storage_nbytes + area.storage_nbytes,
    )


@dataclass(frozen=True, slots=True)
class LoadedTensors:
    """What went through the engine's loader and is live: the way back to it outlives a trainer's stay."""

    layout_digest: bytes
    area: torch.Tensor

    def in_host_memory(self) -> LoadedTensors:
        """The same tensors where they take nothing from a GPU that others want."""
        return LoadedTensors(self.layout_digest, self.area.cpu())

    def fits(self, layout: Layout) -> bool:
        """Whether a layout of ``with_area`` has the same tensors at the same places."""
        return bool(layout.through_loader) and self.layout_digest == _digest(layout)


def area_sizes(layout: Layout, loaded: LoadedTensors | None) -> tuple[int, ...]:
    """What a staged ``LoaderArea`` allocates: two areas, or one where ``loaded`` is the other."""
    if not layout.through_loader:
        return ()
    nbytes = layout.storage_nbytes[-1]
    return (nbytes,) if loaded is not None and loaded.fits(layout) else (nbytes, nbytes)


class LoaderArea:
    """The last storage of a layout of ``with_area``; of a staged target two of them, which take turns.

    A round fills ``staged``. ``keep`` says that the loader has made its tensors live: they stay as they are until the
    next ``keep``, so that they can be loaded again, and the next round fills the other area. Both areas are allocated here:
    nothing that ``keep`` and ``take_back`` do can fail.
    """

    def __init__(
        self,
        layout: Layout,
        allocate: Callable[[int], torch.Tensor],
        *,
        keeps: bool,
        loaded: LoadedTensors | None = None,
    ) -> None:
        """``keeps``: there are two areas; ``loaded`` is what an earlier one kept, if it fits."""
        number = len(layout.storage_nbytes) - 1
        self._placements = [placement for placement in layout.placements if placement.storage == number]
        self._layout_digest = _digest(layout)
        nbytes = layout.storage_nbytes[number]
        self.staged = allocate(nbytes).zero_()
        self._other: torch.Tensor | None = None
        self._is_loaded = self._was_loaded = False
        if keeps:
            self._is_loaded = loaded is not None and loaded.fits(layout)
            if loaded is not None and self._is_loaded:
                self._other = _at_home(loaded.area, self.staged, allocate)
            else:
                self._other = allocate(nbytes).zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all areas."""
        return self.staged.numel() + (0 if self._other is None else self._other.numel())

    @property
    def live(self) -> torch.Tensor | None:
        """The area whose tensors went through the loader and are live; None when nobody has them."""
        return self._other if self._is_loaded else None

    def tensors(self) -> TensorPairs:
        """The staged tensors, in manifest order."""
        return self._tensors_in(self.staged)

    def live_tensors(self) -> TensorPairs | None:
        """Those that are live, or were before the loader began on the staged ones; None when nobody has them."""
        return None if self.live is None else self._tensors_in(self.live)

    def keep(self) -> None:
        """The staged tensors are live now; those before them stay until the next round overwrites them."""
        if self._other is not None:
            self.staged, self._other = self._other, self.staged
            self._is_loaded, self._was_loaded = True, self._is_loaded

    def take_back(self) -> None:
        """The tensors before the last ``keep`` count as live again."""
        if self._other is not None:
            self.staged, self._other = self._other, self.staged
            self._is_loaded, self._was_loaded = self._was_loaded, False

    def loaded(self) -> LoadedTensors | None:
        """What is live through the loader, for the area of the next trainer."""
        return None if self.live is None else LoadedTensors(self._layout_digest, self.live)

    def _tensors_in(self, area: torch.Tensor) -> TensorPairs:
        memory = Memory([area])
        for placement in self._placements:
            sizes = placement.region.sizes
            strides = contiguous_strides(sizes)
            yield placement.region.name, memory.view(0, placement.dtype, placement.offset, sizes, strides)


def _digest(layout: Layout) -> bytes:
    number = len(layout.storage_nbytes) - 1
    own = [placement for placement in layout.placements if placement.storage == number]
    return hashlib.sha256(msgspec.msgpack.encode(own)).digest()


def _at_home(area: torch.Tensor, like: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The area, or a copy of it where it lies in another kind of memory: rounds will land in it."""
    if area.device == like.device and (area.is_cuda or area.is_pinned() == like.is_pinned()):
        return area
    return allocate(area.numel()).copy_(area)
