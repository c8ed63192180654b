"""The few calls of the CUDA driver that torch does not offer: memory handles for other processes, and locked host memory.

Load-bearing: a handle names a whole allocation (for torch: a segment of its caching allocator), so addresses travel as
handle plus offset; a process cannot open its own handles; opening a handle again adds to a count and gives the same address.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from weightcast.errors import TransportError, Unsupported

HANDLE_NBYTES = 64
_IS_LEGACY_IPC_CAPABLE = 10
_LAZY_ENABLE_PEER_ACCESS = 1
_PORTABLE_MAPPED_READ_ONLY = 0x01 | 0x02 | 0x08


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
    library.cuMemHostRegister_v2.argtypes = [pointer, size, ctypes.c_uint]
    library.cuMemHostUnregister.argtypes = [pointer]
    library.cuMemHostGetDevicePointer_v2.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_uint]
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
    with _context(device) as driver:
        return _range_of(driver, address)


def allocations_of(addresses: Sequence[int], device: torch.device) -> list[tuple[int, int] | None]:
    """``allocation_of`` many addresses; None for one whose allocation is of a kind that has no handle: expandable segments and
    cudaMallocAsync give none."""
    capable = ctypes.c_int()
    pointer, found = ctypes.addressof(capable), []
    with _context(device) as driver:
        for address in addresses:
            _check(driver.cuPointerGetAttribute(pointer, _IS_LEGACY_IPC_CAPABLE, address), "cannot look at GPU memory")
            found.append(_range_of(driver, address) if capable.value else None)
    return found


def _range_of(driver: ctypes.CDLL, address: int) -> tuple[int, int]:
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    code = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(nbytes), address)
    _check(code, f"address {address:#x} is not in GPU memory")
    return base.value, nbytes.value


def export_allocation(address: int, device: torch.device) -> bytes:
    """The handle of the allocation at ``address``, its start."""
    handle = _Handle()
    with _context(device) as driver:
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


def register_host(address: int, nbytes: int, device: torch.device) -> None:
    """Lock pages of this process in the host's memory, which may be mapped for reading only, so that the GPU reads them itself at the
    same address. Undo it before the pages are unmapped.

    TransportError where the system or the GPU does not allow it.
    """
    seen = ctypes.c_uint64()
    with _context(device) as driver:
        code = driver.cuMemHostRegister_v2(address, nbytes, _PORTABLE_MAPPED_READ_ONLY)
        _check(code, f"cannot register {nbytes} bytes of host memory with CUDA")
        code = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(seen), address, 0)
        if code or seen.value != address:
            driver.cuMemHostUnregister(address)
            _check(code, "registered host memory has no address on the GPU")
            raise TransportError("the GPU sees registered host memory at another address")


def unregister_host(address: int, device: torch.device) -> None:
    """Undo one ``register_host``; no work that uses the memory may be queued any more."""
    with _context(device) as driver:
        _check(driver.cuMemHostUnregister(address), "cannot unregister host memory")


def bytes_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """GPU memory, or locked memory of the host, at an address as a flat uint8 tensor of ``device``. It does not own the memory."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
