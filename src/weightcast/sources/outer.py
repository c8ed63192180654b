"""OuterSource: a source that prepares tensors of its own for each round and publishes them through an inner source."""

from __future__ import annotations

from weightcast.layout.memory import Memory
from weightcast.sources.base import Source


class OuterSource(Source):
    """What a source over an inner one leaves to it: where values lie, and that they can be moved. Subclasses say what is prepared."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.manifest, self.device, self.dtype = inner.manifest, inner.device, inner.dtype
        self._take_over()

    def _take_over(self) -> None:
        self.layout, self.memory = self._inner.layout, self._inner.memory

    def consolidate(self) -> None:
        self._inner.consolidate()
        self._take_over()

    def rebind(self, memory: Memory) -> None:
        self._inner.rebind(memory)
        self._take_over()

    def check(self) -> None:
        self._inner.check()

    def follow(self) -> bool:
        if not self._inner.follow():
            return False
        self._take_over()
        return True

    def close(self) -> None:
        self._inner.close()
        super().close()
