"""The safetensors format, read with nothing but the file's own bytes trusted: what a header says is checked before it is used.

Format of a file (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header size, a JSON object of that size that
maps names to {"dtype", "shape", "data_offsets": [begin, end] after the header}, then the data. Tensors lie one behind the other:
no byte belongs to two of them, and none to nobody.
"""

from __future__ import annotations

import bisect
import math
import os
import stat
from collections.abc import Mapping

import msgspec

from weightcast.errors import InvalidInput
from weightcast.manifest import MAX_DIMS, is_countable
from weightcast.manifest.dtypes import itemsize_of
from weightcast.quoted import quoted
from weightcast.untrusted.known import known

MAX_HEADER_NBYTES = 64 * 2**20
MAX_TENSORS = 200_000
"""In one checkpoint; the largest models have some seventy thousand."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_HINT = "Save the checkpoint anew with safetensors"


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a file: its element type (wire name), its shape, and the bytes of the file that it takes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header:
    """The tensors of one file, in the order in which they lie there."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = dict(tensors)
        self._begins = [tensor.begin for tensor in self.tensors.values()]
        self._ends = [tensor.end for tensor in self.tensors.values()]

    def holds(self, begin: int, end: int) -> bool:
        """Whether these bytes of the file belong to one tensor."""
        at = bisect.bisect_left(self._ends, end)
        return at < len(self._begins) and self._begins[at] <= begin


def open_regular(path: str) -> int:
    """A read-only descriptor of a regular file; InvalidInput for anything else, and OSError as ``os.open`` has it."""
    # Non-blocking, so that a pipe in its place cannot hold the reader up.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInput(f"{path} is not a regular file", field="checkpoint", hint=_HINT)
    return descriptor


def read_header(descriptor: int, path: str) -> Header:
    """What lies in an open file; InvalidInput, which names ``path``, for anything that is not exactly the format."""
    nbytes = os.fstat(descriptor).st_size
    size = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if nbytes < 10 or not 2 <= size <= min(MAX_HEADER_NBYTES, nbytes - 8):
        raise InvalidInput(f"{path} is not a safetensors file", field="checkpoint", hint=_HINT)
    try:
        raw = msgspec.json.decode(os.pread(descriptor, size, 8), type=known(dict[str, msgspec.Raw]))
        raw.pop("__metadata__", None)
        if len(raw) > MAX_TENSORS:
            raise _bad(path, f"{len(raw)} tensors; at most {MAX_TENSORS} are taken")
        decoder = msgspec.json.Decoder(known(_Entry))
        entries = {name: decoder.decode(entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(path, str(error)) from None
    return Header(_checked(entries, path, 8 + size, nbytes))


def _checked(entries: Mapping[str, _Entry], path: str, start: int, nbytes: int) -> dict[str, StoredTensor]:
    """The entries in the order of their bytes, which they have to fill from the header to the end of the file."""
    tensors: dict[str, StoredTensor] = {}
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = (start + offset for offset in entry.data_offsets)
        shown = quoted(name)
        if entry.dtype not in DTYPES:
            raise _bad(path, f"tensor {shown} has the unknown type {quoted(entry.dtype)}")
        dtype = DTYPES[entry.dtype]
        if len(entry.shape) > MAX_DIMS:
            raise _bad(path, f"tensor {shown} has {len(entry.shape)} dimensions, more than {MAX_DIMS}")
        if not is_countable(entry.shape) or end - begin != math.prod(entry.shape) * itemsize_of(dtype):
            raise _bad(path, f"tensor {shown} has {end - begin} bytes, which its shape and type do not need")
        if begin != at:
            what = "shares bytes with another one" if begin < at else "lies behind bytes of nobody"
            raise _bad(path, f"tensor {shown} {what}")
        tensors[name] = StoredTensor(dtype=dtype, shape=entry.shape, begin=begin, end=end)
        at = end
    if at != nbytes:
        raise _bad(path, f"its tensors end at byte {at}, the file has {nbytes}")
    return tensors


def _bad(path: str, why: str) -> InvalidInput:
    return InvalidInput(f"{path}: bad safetensors header: {why}", field="checkpoint", hint=_HINT)
