"""Names of element types on the wire, as checkpoints and vLLM spell them ("bfloat16", "float8_e4m3fn", ...)."""

from __future__ import annotations

import numpy as np
import torch

from weightcast.errors import InvalidInput

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
        torch.complex64,
    )
}

DTYPE_NAMES: tuple[str, ...] = tuple(_DTYPES)
DTYPE_NUMBERS = {name: number for number, name in enumerate(DTYPE_NAMES)}
"""What a type is called in tables of numbers."""
ITEMSIZES = np.array([dtype.itemsize for dtype in _DTYPES.values()], np.int64)
"""Bytes of one element, by a type's number."""


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a wire name; raises InvalidInput for a name that is not one."""
    try:
        return _DTYPES[name]
    except (KeyError, TypeError):
        raise InvalidInput(f"unknown dtype {name!r}; known: {', '.join(_DTYPES)}", field="dtype") from None


def name_of(dtype: torch.dtype) -> str:
    """The wire name of a torch dtype; raises InvalidInput for one that checkpoints do not use."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InvalidInput(f"dtype {dtype} cannot be published; supported: {', '.join(_DTYPES)}", field="dtype")
    return name


def itemsize_of(name: str) -> int:
    """Bytes of one element."""
    return dtype_of(name).itemsize
