"""Memory of expandable segments for other processes: torch's allocator alone knows which pages such memory is made of, so it shares them.

Torch counts the users of what it shares, to keep memory alive whose owner has freed it. Here the owner keeps the memory alive by itself,
so what is shared is a storage that owns nothing, and the count goes back to none with the owner's ``close``, whatever became of users.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from weightcast.cuda import driver
from weightcast.errors import TransportError, Unsupported


class SharedRange(NamedTuple):
    """What another process needs to map a range: torch's handle, where in what the handle names the range begins, and the count."""

    handle: bytes
    offset: int
    counter: bytes
    counter_offset: int


class SharedByTorch:
    """A range of this process's GPU memory that begins where torch's allocator gave it out. The caller keeps the memory alive."""

    def __init__(self, address: int, nbytes: int, device: torch.device) -> None:
        self._alias: torch.UntypedStorage | None = driver.bytes_at(address, nbytes, device).untyped_storage()
        try:
            shared = self._alias._share_cuda_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise Unsupported(
                f"the trainer's weights lie in GPU memory that other processes cannot map ({reason})",
                hint="Start the trainer without backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF, with weights in memory of torch's "
                "own allocator, or use the nccl transport",
            ) from None
        _, handle, _, offset, counter, counter_offset, _, _ = shared
        self.range = SharedRange(bytes(handle), int(offset), bytes(counter), int(counter_offset))

    def close(self) -> None:
        """Stop counting users; idempotent."""
        if self._alias is not None:
            with contextlib.suppress(RuntimeError):
                torch.UntypedStorage._release_ipc_counter_cuda(self.range.counter, self.range.counter_offset)
            self._alias = None


def open_shared(shared: SharedRange, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """Map another process's range for ``device``: ``nbytes`` from its beginning, until the storage is dropped."""
    try:
        with torch.cuda.device(device):
            storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(
                device.index, shared.handle, nbytes, shared.offset, shared.counter, shared.counter_offset, b"", False
            )
    except RuntimeError as error:
        raise TransportError(f"cannot map the trainer's expandable segments: {str(error).splitlines()[0]}") from None
    return storage
