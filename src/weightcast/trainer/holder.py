"""Holder: one trainer rank's source, and what transports made of its memory."""

from __future__ import annotations

from collections.abc import Collection

from weightcast.memory import Memory
from weightcast.trainer.sources.base import Source
from weightcast.transports.registry import registry


class Holder:
    """Lets transports make a source's memory reachable, each once. Not thread-safe."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._adopted: dict[str, Memory] = {}

    def adopt(self, transports: Collection[str]) -> bool:
        """Have these transports, too; True when the source's memory moved (its layout may have changed with it).

        Raises StateError when the user's tensors are not what they were: they would be moved with values that they no longer have.
        """
        source, before = self.source, self.source.memory
        if not self._adopted.keys() >= set(transports):
            source.check_form()
        if transports and not self._adopted and source.device.type == "cpu":
            # One arena makes a round's cost independent of the number of tensors, for copies and digests alike.
            source.consolidate()
        for name in sorted(transports):
            if name in self._adopted:
                continue
            memory = registry().get(name).adopt(source.memory)
            if memory is not source.memory:
                source.rebind(memory)
            self._adopted[name] = memory
        return source.memory is not before

    def release(self) -> None:
        """Close the source and give up what transports made of its memory; idempotent."""
        self.source.close()
        for name, memory in self._adopted.items():
            registry().get(name).release(memory)
        self._adopted.clear()
