"""A curve in the terminal, drawn with braille dots (two by four in each character)."""

from __future__ import annotations

import math
from collections.abc import Sequence

# The bit of each dot in a braille character, by column and then row from the top (Unicode block U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to ``window - 1`` values before it; as long as ``values``."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def curve(values: Sequence[float], *, width: int = 60, height: int = 10, label: str = "") -> list[str]:
    """``values`` over their index as lines of text: ``height`` lines of the curve with its scale, an axis and its ends.

    The scale spans what is there (0 to 1 where all values are equal). Values that are not finite raise ValueError.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a curve needs finite values")
    if not values:
        return ["(nothing to draw)"]
    low, high = min(values), max(values)
    if low == high:
        low, high = min(0.0, low), max(1.0, high)
    cells = _cells(values, low, high, width, height)
    lines = []
    for row, line in enumerate(cells):
        value = high - (high - low) * row / max(1, height - 1)
        scale = f"{value:8.3f}" if row % 3 == 0 or row == height - 1 else " " * 8
        lines.append(f"{scale} │{''.join(chr(0x2800 + cell) for cell in line)}")
    lines.append(f"{'':8} └{'─' * width}")
    last = str(len(values))
    lines.append(f"{'':10}1{label.center(width - 1 - len(last))}{last}")
    return lines


def _cells(values: Sequence[float], low: float, high: float, width: int, height: int) -> list[list[int]]:
    columns, rows = width * 2, height * 4
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for x in range(columns):
        position = x / (columns - 1) * (len(values) - 1)
        left = int(position)
        right = min(left + 1, len(values) - 1)
        value = values[left] + (values[right] - values[left]) * (position - left)
        y = round((high - value) / (high - low) * (rows - 1))
        # A steep piece is filled up to its neighbour, so that the line has no holes.
        reach = range(min(y, previous + 1), max(y, previous - 1) + 1) if previous is not None else range(y, y + 1)
        for dot in reach:
            cells[dot // 4][x // 2] |= _DOTS[x % 2][dot % 4]
        previous = y
    return cells
