"""What was compiled for the last few memories."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by memory number, or by memory number and part; at most ``size`` of them. A compiled copy keeps its memory alive, so old
    values have to go.

    Two memories are in use when a shadow and the live parameters take turns. ``parts`` is the number of values for each memory.
    """

    def __init__(self, size: int = 4, *, parts: int = 1) -> None:
        self._size = size * parts
        self._values: dict[Hashable, T] = {}

    def get(self, number: Hashable, make: Callable[[], T]) -> T:
        """Return the value of ``number``, and make the value when it is not there. The value that was unused for longest makes room."""
        value = self._values.pop(number) if number in self._values else make()
        self._values[number] = value
        while len(self._values) > self._size:
            del self._values[next(iter(self._values))]
        return value

    def clear(self) -> None:
        self._values.clear()
