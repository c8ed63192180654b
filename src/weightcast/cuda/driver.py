"""The few calls of the CUDA driver that torch does not offer: memory handles for other processes, as plain bytes.

Load-bearing: a handle names a whole allocation (for torch: a segment of its caching allocator), so addresses travel as
handle plus offset; a process cannot open its own handles; opening a handle again adds to a count and gives the same address.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache

import torch

from weightcast.errors import TransportError, Unsupported

HANDLE_NBYTES = 64
_IS_LEGACY_IPC_CAPABLE = 10
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_NBYTES),)


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unsupported(f"no CUDA driver: {error}") from None
    pointer, size = ctypes.c_uint64, ctypes.c_size_t
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuDevicePrimaryCtxRetain.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int]
    library.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
    library.cuCtxPopCurrent_v2.argtypes = [ctypes.POINTER(ctypes.c_void_p)]
    library.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, pointer]
    library.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(size), pointer]
    library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), pointer]
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(pointer), _Handle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [pointer]
    return library


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise TransportError(f"{what}: CUDA error {code}: {reason}")


@cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """A GPU's primary context, which torch uses, too. Never released: the last release would destroy it, and with it
    every mapping made before torch has a hold on it."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index), f"cannot use GPU {index}")
    return context


@contextlib.contextmanager
def _context(device: torch.device) -> Iterator[ctypes.CDLL]:
    """The device's primary context made current on this thread, which may never have used CUDA."""
    driver = _driver()
    index = torch.cuda.current_device() if device.index is None else device.index
    _check(driver.cuCtxPushCurrent_v2(_primary_context(index)), f"cannot use GPU {index}")
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def allocation_of(address: int, device: torch.device) -> tuple[int, int]:
    """Start address and size of the allocation that an address lies in."""
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    with _context(device) as driver:
        code = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(nbytes), address)
        _check(code, f"address {address:#x} is not in GPU memory")
    return base.value, nbytes.value


def export_allocation(address: int, device: torch.device) -> bytes:
    """The handle of the allocation at ``address``, its start; Unsupported when its kind has none."""
    capable = ctypes.c_int()
    handle = _Handle()
    with _context(device) as driver:
        pointer = ctypes.addressof(capable)
        _check(driver.cuPointerGetAttribute(pointer, _IS_LEGACY_IPC_CAPABLE, address), "cannot look at GPU memory")
        if not capable.value:
            raise Unsupported(
                "the trainer's weights lie in GPU memory that other processes cannot map (expandable segments or "
                "cudaMallocAsync)",
                hint="Start the trainer without expandable_segments:True and backend:cudaMallocAsync in "
                "PYTORCH_CUDA_ALLOC_CONF, or use the nccl transport",
            )
        _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), address), "cannot export GPU memory")
    return bytes(handle)


def open_allocation(handle: bytes, device: torch.device) -> int:
    """Map another process's allocation for ``device``; its start address here. Close it as often as it was opened."""
    address = ctypes.c_uint64()
    with _context(device) as driver:
        code = driver.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS
        )
        _check(code, "cannot map the trainer's GPU memory")
    return address.value


def close_allocation(address: int, device: torch.device) -> None:
    """Undo one ``open_allocation``; no work that uses the memory may be queued any more."""
    with _context(device) as driver:
        _check(driver.cuIpcCloseMemHandle(address), "cannot unmap the trainer's GPU memory")


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """GPU memory at an address as a flat uint8 tensor of ``device``. It does not own the memory."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
