"""Memory: the storages of one process as flat byte tensors, and typed views into them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from weightcast.errors import InvalidInput
from weightcast.manifest.dtypes import dtype_of

_numbers = itertools.count(1)


class FileSpan(NamedTuple):
    """Where the bytes of a storage lie in a file."""

    path: str
    offset: int


class Memory:
    """Numbered storages (1-D uint8 tensors). ``number`` is unique in the process: compiled copies are cached by it.

    ``is_arena``: all placements are padded (see layout.is_padded) and the bytes between them are zero, so copies and digests may run
    from the end of one across the padding to the start of the next.
    ``files``: per storage the span of a file that it is a read-only map of, or None; a transport may read the file instead.
    ``gpu``: the storages are page-locked host memory that this GPU's kernels read and write.
    """

    def __init__(
        self,
        storages: Sequence[torch.Tensor],
        *,
        is_arena: bool = False,
        files: Sequence[FileSpan | None] = (),
        gpu: torch.device | None = None,
    ) -> None:
        for storage in storages:
            if storage.dtype != torch.uint8 or storage.dim() != 1 or (storage.numel() and not storage.is_contiguous()):
                raise InvalidInput("a storage is a contiguous 1-D uint8 tensor")
        self.storages = tuple(storages)
        if files and len(files) != len(storages):
            raise InvalidInput(f"{len(storages)} storages, {len(files)} files", field="files")
        self.is_arena = is_arena
        self.gpu = gpu
        self.files = tuple(files) or (None,) * len(self.storages)
        self.number = next(_numbers)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each storage. A stream has thousands of storages, and something is compiled for each."""
        return tuple(storage.numel() for storage in self.storages)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each storage begins."""
        return tuple(storage.data_ptr() for storage in self.storages)

    @cached_property
    def is_cuda(self) -> bool:
        """Whether a storage lies on a GPU."""
        return any(storage.is_cuda for storage in self.storages)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    def view(self, storage: int, dtype: str, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """A strided view of ``dtype`` elements; offset and strides in elements. Shares memory with the storage.

        Raises InvalidInput for one that leaves the storage: torch would grow the storage and so move all of its bytes.
        """
        target = dtype_of(dtype)
        flat = self.storages[storage]
        if flat.storage_offset() % target.itemsize:
            raise InvalidInput(f"storage {storage} does not start at a multiple of {target.itemsize} bytes")
        if 0 not in sizes:
            end = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
            if offset < 0 or end * target.itemsize > flat.numel():
                raise InvalidInput(f"storage {storage} has {flat.numel()} bytes, not {end * target.itemsize}")
        base = torch.empty(0, dtype=target, device=flat.device)
        start = flat.storage_offset() // target.itemsize + offset
        return base.set_(flat.untyped_storage(), start, tuple(sizes), tuple(strides))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole untyped storage behind a tensor as a flat uint8 tensor (shares memory)."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def own_storage(flat: torch.Tensor, start: int, nbytes: int) -> torch.UntypedStorage:
    """A torch storage of exactly these bytes of a flat uint8 tensor in host memory. It shares them, and keeps them valid.

    A view would have the whole of ``flat`` behind it: whatever saves, pickles or copies a tensor goes by its storage.
    """
    part = flat.detach().numpy().data[start : start + nbytes]
    return torch.frombuffer(part, dtype=torch.uint8).untyped_storage()
