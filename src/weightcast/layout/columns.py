"""Columns: tables of whole numbers as bytes, each column as narrow as its largest number allows. Pure.

column   its numbers, little-endian unsigned, and one last byte: how many bytes a number has. A column whose numbers are all the
         same, but for the first one of a table, has that number once, in eight bytes, and the last byte 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from weightcast.errors import InvalidInput

Numbers: TypeAlias = npt.NDArray[np.int64]
"""A column (one dimension), or a table (first its columns, then its rows)."""
_WIDTHS = (1, 2, 4, 8)
_SAME = 0


def pack(table: Numbers) -> tuple[bytes, ...]:
    """The columns of a table of numbers that are none below zero; equal tables give equal bytes."""
    if not table.shape[1]:
        return (b"\x01",) * len(table)
    least = [
        -1,
        *table[1:].min(axis=1).tolist(),
    ]  # the first column is as long as the table, so that no few bytes claim many rows
    return tuple(map(_packed, table, least, table.max(axis=1).tolist()))


def _packed(column: Numbers, least: int, most: int) -> bytes:
    if least == most:
        return least.to_bytes(8, "little") + bytes([_SAME])
    width = next(width for width in _WIDTHS if most < 256**width)
    return column.astype(f"<u{width}").tobytes() + bytes([width])


def unpack(columns: Sequence[bytes], count: int) -> Numbers:
    """The table of ``count`` rows; InvalidInput for bytes that are none."""
    widths = [column[-1] if column else -1 for column in columns]
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        is_known = width in _WIDTHS or (width == _SAME and number > 0)
        if not is_known or len(column) != 1 + (8 if width == _SAME else width * count):
            raise InvalidInput(f"a column of {len(column)} bytes for {count} numbers")
    table = np.empty((len(columns), count), np.int64)
    for row, column, width in zip(table, columns, widths, strict=True):
        row[:] = np.frombuffer(column, f"<u{width or 8}", count=1 if width == _SAME else count)
    if table.size and int(table.min()) < 0:
        raise InvalidInput("a number of more than 63 bits in a column")
    return table
