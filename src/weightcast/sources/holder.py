"""Holder: one trainer rank's source, and what transports made of its memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch

from weightcast.deadline import Deadline
from weightcast.errors import StateError, Unsupported, WeightsMoved
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.sources.base import Source
from weightcast.sources.snapshot import Snapshot
from weightcast.transports.registry import registry


class GivenUp(Source):
    """What a publisher that is closed has in place of its source: nothing."""

    def __init__(self) -> None:
        self.manifest, self.layout, self.memory = Manifest.of(()), Layout(placements=(), storage_nbytes=()), Memory(())
        self.device = torch.device("cpu")

    def rebind(self, memory: Memory) -> None:
        self.refresh()

    def refresh(self) -> None:
        raise StateError("the publisher is closed", hint="Make a new Publisher")


class Holder:
    """Has a source made of what the user gave, and lets transports make the source's memory reachable, each once. Not thread-safe."""

    def __init__(self, make: Callable[[], Source], *, lets_go: bool = False) -> None:
        """``lets_go``: what is made anew stands for the same tensors of the user's, wherever they lie by then."""
        self._make, self._lets_go = make, lets_go
        self.source = make()
        self._is_let_go = False
        self.is_new = False
        """Whether the source is another one that nobody has taken up: the next ``renew`` says so."""
        self._adopted: dict[str, Memory] = {}

    def take(self, deadline: Deadline, *, alone: bool) -> Snapshot:
        """Have the values of this moment, until they are put down, in memory that the user's tensors are no part of.

        The first time the source becomes a snapshot of what it was, whose memory is another one. Raises Unsupported where that cannot
        be, or what the source raises. ``alone``: no other rank counts on the kind of device where the values lie.
        """
        if self._is_let_go or self.is_new:
            self.is_new = self.renew() or self.is_new
        snapshot = self.source if isinstance(self.source, Snapshot) else self._snapshot(alone)
        snapshot.take(deadline)
        return snapshot

    def _snapshot(self, alone: bool) -> Snapshot:
        source = self.source
        if source.layout.is_streamed:
            raise Unsupported("a stream is read while its round runs", hint="Publish it without wait=False")
        if source.is_private:
            self.source = snapshot = Snapshot(source)
            return snapshot
        if self._lets_go:
            # Tensors that are in the source's memory move back: the snapshot's is what transports may move.
            with self._remaking():
                self.source = self._make()
        elif self._adopted and source.device.type == "cpu":
            raise Unsupported(
                f"the tensors of this {type(source).__name__} have moved to shared memory for rounds that are waited for",
                hint="Give Publisher what it is made of, or use wait=False from the first round on",
            )
        else:
            self._release_adopted()
        self.is_new = True
        self.source = snapshot = Snapshot(self.source, may_be_on_host=alone)
        return snapshot

    def put_down(self) -> None:
        """Let the values of the next round be taken."""
        if isinstance(self.source, Snapshot):
            self.source.put_down()

    def _made(self) -> Source:
        """A source of what the user gave, of the same kind as the present one."""
        if not isinstance(self.source, Snapshot):
            return self._make()
        return Snapshot(self._make(), may_be_on_host=self.source.may_be_on_host)

    def renew(self) -> bool:
        """Have the source made anew where the user's tensors are not what they were; True when it was.

        Raises what making it raises, or StateError where the user gave the source itself; then the former one stays.
        """
        if self._is_let_go or self.is_new:
            if self._is_let_go and not self._follow_whatever_came():
                self.source.close()
                self.source = self._made()
            self._is_let_go = self.is_new = False
            return True
        try:
            self.source.check_form()
        except StateError as error:
            before = self.source.memory
            if isinstance(error, WeightsMoved) and self._follow():
                return self.source.memory is not before
            former, made = self.source, self._make()
            if made is former or (isinstance(former, Snapshot) and made is former.inner):
                error.hint = "Give Publisher the module or mapping itself, of which it makes a source anew; or make a new Publisher"
                raise
            is_streamed = made.layout.is_streamed
            if not is_streamed:
                made.close()  # it refers to tensors in the former one's memory, which move back first where nothing else does
            with self._remaking():
                self.source = made if is_streamed else self._made()
            return True
        return False

    @contextmanager
    def _remaking(self) -> Iterator[None]:
        """Give up the source, and have another one made inside. Where that does not come to its end, the next ``renew`` makes one."""
        self._is_let_go = self.is_new = True
        self.release()
        yield
        self._is_let_go = self.is_new = False

    def _follow(self) -> bool:
        """Have the source take up tensors of the user's that lie elsewhere."""
        before = self.source.memory
        if not self.source.follow():
            return False
        if self.source.memory is not before:
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

    def give_up(self) -> None:
        """``release``, and refer to nothing that the user gave, for good: a publisher that is closed may be referred to for long."""
        self.release()
        self.source = GivenUp()
        self._make = lambda: self.source

    def _release_adopted(self) -> None:
        for name, memory in self._adopted.items():
            registry().get(name).release(memory)
        self._adopted.clear()
