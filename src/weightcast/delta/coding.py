"""Coding: changes as bytes, and back. Bytes of the wire are taken apart here: whatever they are, they end in changes or in ProtocolError.

For each kind of the form, in its order, a head of twelve bytes (changes, wide gaps, wide values; little-endian unsigned 32, like all
numbers here), then one zstd frame of all bodies, one after the other. A body has

    gaps          for each change how many elements lie between it and the one before, one byte each; 255 says: see the wide gaps
    wide gaps     four bytes each
    values        differences of bits, folded so that small ones of either sign are small numbers, one byte each; 255 says: see the wide
                  values. Where that is no shorter, and for absolute values: whole elements, their first bytes first, then their
                  second ones, and so on; the head says 2^32 - 1 wide values then
    wide values   whole elements

A weight's step is a few units of its last place, so that most changes are two bytes, which zstd halves. The bits of a float count like
those of an integer, as its sign is in front: the difference of two floats of one sign is the number of floats between them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from weightcast.delta.changes import Bits, Changes, Found, Positions
from weightcast.delta.form import UNSIGNED, Form, Kind
from weightcast.errors import ProtocolError

LEVEL = 1
ESCAPE = 255
WHOLE = 2**32 - 1
"""In the place of the number of wide values: all are whole elements."""
_HEAD = struct.Struct("<III")
_WIDE = np.dtype("<u4")


class Part(NamedTuple):
    """What is written of one kind: numbers of a byte each, and wider ones that stand behind where a byte is 255.

    ``values`` are folded differences; where it ``is_whole``, all bytes of whole elements, and nothing is wide.
    """

    kind: Kind
    gaps: npt.NDArray[np.uint8]
    wide_gaps: npt.NDArray[Any]
    values: npt.NDArray[np.uint8]
    wide_values: npt.NDArray[Any]
    is_whole: bool = False


def encode(form: Form, found: Sequence[Found | Part]) -> bytes | None:
    """The changes as bytes; None where these would not be fewer than the image's. A kernel that finds differences gives Parts of them."""
    by_kind = {one.kind: one for one in found}
    heads, bodies = [], []
    for kind in form.kinds:
        one = by_kind.get(kind)
        head, body = (_HEAD.pack(0, 0, 0), []) if one is None else _body(one)
        heads.append(head)
        bodies += body
    nbytes = sum(body.nbytes for body in bodies)
    if nbytes > form.nbytes:
        return None
    encoded = b"".join(heads) + _compressed(b"".join(body.tobytes() for body in bodies))
    return encoded if len(encoded) < form.nbytes else None


def _body(found: Found | Part) -> tuple[bytes, list[npt.NDArray[Any]]]:
    if isinstance(found, Found):
        found = _part(found)
    kind, gaps, wide_gaps, values, wide_values, _ = found
    own, heads = np.dtype(UNSIGNED[kind.itemsize]).newbyteorder("<"), (len(gaps), len(wide_gaps))
    before: list[npt.NDArray[Any]] = [gaps, wide_gaps.astype(_WIDE)]
    if not found.is_whole and _is_shorter(len(values), len(wide_values), kind):
        return _HEAD.pack(*heads, len(wide_values)), [*before, values, wide_values.astype(own)]
    whole = values.view(own) if found.is_whole else _widened(values, wide_values, own)
    planes = np.ascontiguousarray(whole.view(np.uint8).reshape(len(whole), kind.itemsize).T)
    return _HEAD.pack(*heads, WHOLE), [*before, planes]


def _part(found: Found) -> Part:
    gaps, wide_gaps = _narrow(np.diff(found.positions, prepend=-1) - 1)
    if found.kind.is_absolute:
        return Part(found.kind, gaps, wide_gaps, found.new.view(np.uint8), found.new[:0], is_whole=True)
    return Part(found.kind, gaps, wide_gaps, *_narrow(_folded(found.new - found.old)))


def _narrow(numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Numbers as bytes, and those that are none."""
    is_wide = numbers >= ESCAPE
    return np.where(is_wide, ESCAPE, numbers).astype(np.uint8), numbers[is_wide]


def _is_shorter(count: int, wide: int, kind: Kind) -> bool:
    """Whether differences of a byte each, with the wide ones behind them, are fewer bytes than whole elements."""
    return count + wide * kind.itemsize < count * kind.itemsize


def _folded(differences: Bits) -> Bits:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    bits = differences.dtype.itemsize * 8
    is_negative = differences >> differences.dtype.type(bits - 1)
    return (differences << differences.dtype.type(1)) ^ (differences.dtype.type(0) - is_negative)


def _unfolded(folded: Bits) -> Bits:
    one = folded.dtype.type(1)
    return (folded >> one) ^ (folded.dtype.type(0) - (folded & one))


def _compressed(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(data)


# -- reading


def decode(form: Form, data: bytes | memoryview) -> list[Changes]:
    """The changes that ``encode`` wrote for a form like this; ProtocolError, and nothing else, for what it cannot have written."""
    return [changes_of(form, part) for part in parts_of(form, data)]


def parts_of(form: Form, data: bytes | memoryview) -> list[Part]:
    """What ``data`` has of each kind that changed, in sizes that fit; what its numbers mean has not been looked at."""
    try:
        return _parts(form, memoryview(data))
    except ValueError as error:
        raise _malformed(str(error)) from None


def changes_of(form: Form, part: Part) -> Changes:
    """The changes of one kind, each that of an element of this kind."""
    own = np.dtype(UNSIGNED[part.kind.itemsize]).newbyteorder("<")
    positions = np.cumsum(_widened(part.gaps, part.wide_gaps, np.dtype(np.int64)) + 1) - 1
    if part.is_whole:
        planes = part.values.reshape(part.kind.itemsize, len(part.gaps))
        values = np.ascontiguousarray(planes.T).view(own).reshape(len(part.gaps))
    else:
        values = _widened(part.values, part.wide_values, own)
    _check_inside(part.kind, form, positions)
    return Changes(part.kind, positions, values if part.kind.is_absolute else _unfolded(values))


def _malformed(why: str) -> ProtocolError:
    return ProtocolError(f"malformed changes: {why}")


def _parts(form: Form, data: memoryview) -> list[Part]:
    ends = len(form.kinds) * _HEAD.size
    if len(data) < ends:
        raise _malformed("they end before they begin")
    heads = list(_HEAD.iter_unpack(data[:ends])) if ends else []
    sizes = [_size(kind, form, *head) for kind, head in zip(form.kinds, heads, strict=True)]
    if sum(sizes) > form.nbytes:
        raise _malformed("they are longer than all values")
    body = np.frombuffer(_expanded(data[ends:], sum(sizes)), np.uint8)
    parts, start = [], 0
    for kind, head, size in zip(form.kinds, heads, sizes, strict=True):
        if head[0]:
            parts.append(_read(kind, body[start : start + size], *head))
        elif size:
            raise _malformed("nothing has wide numbers")
        start += size
    return parts


def _size(kind: Kind, form: Form, count: int, wide_gaps: int, wide_values: int) -> int:
    """Bytes of a body."""
    is_whole = wide_values == WHOLE
    if count > form.numel[kind] or wide_gaps > count or (wide_values > count and not is_whole):
        raise _malformed("there are more than there are values")
    if kind.is_absolute and count and not is_whole:
        raise _malformed("differences to what may not be there")
    values = 0 if not count else count * kind.itemsize if is_whole else count + wide_values * kind.itemsize
    return count + wide_gaps * _WIDE.itemsize + values


def _expanded(frame: memoryview, nbytes: int) -> bytes:
    """The bytes in a frame, which have to be so many: the frame's own word for that is checked before anything is allocated."""
    import zstandard

    try:
        if zstandard.frame_content_size(frame) != nbytes:
            raise _malformed("its frame is of another size")
        expanded = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _malformed(str(error)) from None
    if len(expanded) != nbytes:
        raise _malformed("its frame ends early")
    return expanded


def _read(kind: Kind, body: npt.NDArray[np.uint8], count: int, wide_gaps: int, wide_values: int) -> Part:
    own = np.dtype(UNSIGNED[kind.itemsize]).newbyteorder("<")
    gaps, rest = body[:count], body[count:]
    wide, rest = rest[: wide_gaps * _WIDE.itemsize].view(_WIDE), rest[wide_gaps * _WIDE.itemsize :]
    if wide_values == WHOLE:
        return Part(kind, gaps, wide, rest, rest[:0], is_whole=True)
    return Part(kind, gaps, wide, rest[:count], rest[count:].view(own))


def _widened(narrow: npt.NDArray[np.uint8], wide: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    is_wide = narrow == ESCAPE
    if np.count_nonzero(is_wide) != len(wide):
        raise _malformed("it has other wide numbers than it says")
    numbers = narrow.astype(dtype)
    numbers[is_wide] = wide
    return numbers


def _check_inside(kind: Kind, form: Form, positions: Positions) -> None:
    """Every position has to be that of an element of this kind."""
    starts, ends = form.starts[kind], form.ends[kind]
    at = np.searchsorted(starts, positions, side="right") - 1
    if bool((at < 0).any()) or bool((positions >= ends[at]).any()):
        raise _malformed("a place outside of the values")
