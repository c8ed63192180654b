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
    """Return the engine's layout with one more storage at its end, in which whole tensors wait for the engine's loader."""
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
    """The tensors that went through the engine's loader last and are live. A roll-back loads them again, also when another trainer has
    joined since."""

    layout_digest: bytes
    area: torch.Tensor

    def in_host_memory(self) -> LoadedTensors:
        """Return the same tensors in host memory, where they take no room on a GPU."""
        return LoadedTensors(self.layout_digest, self.area.cpu())

    def fits(self, layout: Layout) -> bool:
        """Whether a layout of ``with_area`` has the same tensors at the same places."""
        return bool(layout.through_loader) and self.layout_digest == _digest(layout)


def area_sizes(layout: Layout, loaded: LoadedTensors | None) -> tuple[int, ...]:
    """Return the sizes of what a staged ``LoaderArea`` allocates: two areas, or one where ``loaded`` serves as the other."""
    if not layout.through_loader:
        return ()
    nbytes = layout.storage_nbytes[-1]
    return (nbytes,) if loaded is not None and loaded.fits(layout) else (nbytes, nbytes)


class LoaderArea:
    """The last storage of a layout of ``with_area``. A staged target has two of these areas, which take turns.

    A round fills ``staged``. ``keep`` says that the loader has made the staged tensors live. These tensors then stay as they are until
    the next ``keep``, so that they can be loaded again, and the next round fills the other area. Both areas are allocated when a
    LoaderArea is made, so that ``keep`` and ``take_back`` cannot fail.
    """

    def __init__(
        self,
        layout: Layout,
        allocate: Callable[[int], torch.Tensor],
        *,
        keeps: bool,
        loaded: LoadedTensors | None = None,
    ) -> None:
        """``keeps`` says that there are two areas. ``loaded`` is what an earlier LoaderArea kept; it is used where it fits."""
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
        """The bytes of all areas together."""
        return self.staged.numel() + (0 if self._other is None else self._other.numel())

    @property
    def live(self) -> torch.Tensor | None:
        """The area whose tensors went through the loader and are live; None when no area has them."""
        return self._other if self._is_loaded else None

    def tensors(self) -> TensorPairs:
        """Return the staged tensors, in manifest order."""
        return self._tensors_in(self.staged)

    def live_tensors(self) -> TensorPairs | None:
        """Return the live tensors, or those that were live before the loader began with the staged ones; None when no area has them."""
        return None if self.live is None else self._tensors_in(self.live)

    def keep(self) -> None:
        """Count the staged tensors as live from now on. The tensors before them stay until the next round overwrites them."""
        if self._other is not None:
            self.staged, self._other = self._other, self.staged
            self._is_loaded, self._was_loaded = True, self._is_loaded

    def take_back(self) -> None:
        """Count the tensors before the last ``keep`` as live again."""
        if self._other is not None:
            self.staged, self._other = self._other, self.staged
            self._is_loaded, self._was_loaded = self._was_loaded, False

    def loaded(self) -> LoadedTensors | None:
        """Return what is live through the loader, for the area of the next trainer."""
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
