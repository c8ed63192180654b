"""Known types: those that msgspec has looked at, so that any thread may decode them. Pure.

Load-bearing: msgspec learns what a Struct is made of when it first decodes one, and two threads that have it learn the same Struct at
once crash the process (msgspec 0.22). So every type goes through ``known`` on its way to msgspec, which a test checks.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_learning = threading.Lock()
_known: set[Any] = set()


def known(kind: T) -> T:
    """The same type, once msgspec knows it and all that it is made of; they are learned by one thread at a time."""
    if kind not in _known:
        with _learning:
            msgspec.msgpack.Decoder(kind)
            _known.add(kind)
    return kind
