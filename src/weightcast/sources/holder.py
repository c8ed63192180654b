"""Holder: one trainer rank's source, and what transports made of its memory."""

from __future__ import annotations

from collections.abc import Callable, Collection

from weightcast.errors import StateError, WeightsMoved
from weightcast.layout.memory import Memory
from weightcast.sources.base import Source
from weightcast.transports.registry import registry


class Holder:
    """Has a source made of what the user gave, and lets transports make the source's memory reachable, each once. Not thread-safe."""

    def __init__(self, make: Callable[[], Source], *, lets_go: bool = False) -> None:
        """``lets_go``: what is made anew stands for the same tensors of the user's, wherever they lie by then."""
        self._make, self._lets_go = make, lets_go
        self.source = make()
        self._is_let_go = False
        self._adopted: dict[str, Memory] = {}

    def renew(self) -> bool:
        """Have the source made anew where the user's tensors are not what they were; True when it was.

        Raises what making it raises, or StateError where the user gave the source itself; then the former one stays.
        """
        if self._is_let_go:
            if not self._follow_whatever_came():
                self.source.close()
                self.source = self._make()
            self._is_let_go = False
            return True
        try:
            self.source.check_form()
        except StateError as error:
            if isinstance(error, WeightsMoved) and self._follow():
                return True
            former, made = self.source, self._make()
            if made is former:
                error.hint = "Give Publisher the module or mapping itself, of which it makes a source anew; or make a new Publisher"
                raise
            # Tensors that are still in the former one's memory move back first.
            self.release()
            self.source = made if made.layout.is_streamed else self._make()
            return True
        return False

    def _follow(self) -> bool:
        """Have the source take up tensors of the user's that lie elsewhere."""
        if not self.source.follow():
            return False
        self._release_adopted()  # what was made of the former memory
        return True

    def _follow_whatever_came(self) -> bool:
        """``_follow`` of a source that was let go of: tensors may be other ones meanwhile."""
        try:
            return self._follow()
        except StateError:
            return False

    def adopt(self, transports: Collection[str]) -> bool:
        """Have these transports, too; True when the source's memory moved (its layout may have changed with it).

        Raises StateError when the user's tensors are not what they were: they would be moved with values that they no longer have.
        """
        source, before = self.source, self.source.memory
        if not source.is_copied and not self._adopted.keys() >= set(transports):
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

    def let_go(self) -> None:
        """Refer to nothing of the user's memory, and have nothing beside it, until ``renew``. A stream keeps its windows, and the user's own
        source stays as it is."""
        if self._is_let_go:
            return
        if self.source.let_go():
            self._release_adopted()
        elif self._lets_go:
            self.release()
        else:
            return
        self._is_let_go = True

    def release(self) -> None:
        """Close the source and give up what transports made of its memory; idempotent."""
        self.source.close()
        self._release_adopted()

    def _release_adopted(self) -> None:
        for name, memory in self._adopted.items():
            registry().get(name).release(memory)
        self._adopted.clear()
