"""Memory of the host as a GPU reaches it: another process's mapping that is registered with CUDA, and page-locked buffers.

Registered and page-locked memory has one address on both sides, so the GPU's kernels replay a plan out of it, or into it, as they do
with memory of their own. ``torch`` sees it as memory of the GPU.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from weightcast.cuda import driver
from weightcast.deadline import Deadline
from weightcast.errors import TransportError

REGISTERED_AT_ONCE_NBYTES = 2**30
"""Locking pages cannot be interrupted and takes up to a second for so many bytes; the deadline is looked at in between."""


class RegisteredHost:
    """Host memory of this process (a mapping of whole pages) that one GPU reads; ``bytes`` is how the GPU sees it.

    It keeps ``memory`` alive. TransportError where pages cannot be registered.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device, deadline: Deadline) -> None:
        self._memory, self._device = memory, device
        self._registered: list[int] = []
        address, nbytes = memory.data_ptr(), memory.numel()
        try:
            for start in range(0, nbytes, REGISTERED_AT_ONCE_NBYTES):
                deadline.check("registering the trainer's shared memory with CUDA")
                count = min(REGISTERED_AT_ONCE_NBYTES, nbytes - start)
                driver.register_host(address + start, -(-count // mmap.PAGESIZE) * mmap.PAGESIZE, device)
                self._registered.append(address + start)
        except BaseException:
            self.close()
            raise
        self.bytes = driver.bytes_at(address, nbytes, device)

    def close(self) -> None:
        """Unregister; idempotent. Nothing that reads the memory may be queued any more."""
        while self._registered:
            # After a failed kernel nothing can be undone any more; the process has lost its GPU then.
            with contextlib.suppress(TransportError):
                driver.unregister_host(self._registered.pop(), self._device)


def locked_buffer(nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Page-locked memory of the host, and the same memory as the GPU sees it: valid as long as the first is kept."""
    host = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return host, driver.bytes_at(host.data_ptr(), nbytes, device)
