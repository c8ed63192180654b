"""How many digests a trainer has queued on its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from weightcast.content.layout_digest import LayoutDigest


@contextmanager
def queued_digests() -> Iterator[list[LayoutDigest]]:
    """Each digest that this process starts from now on, in order."""
    found: list[LayoutDigest] = []
    start = LayoutDigest.start

    def counted(digest: LayoutDigest, *args: Any) -> Callable[[], int]:
        found.append(digest)
        return start(digest, *args)

    with mock.patch.object(LayoutDigest, "start", counted):
        yield found
