"""The shadow: staged copies of the live parameters, and how a commit makes one of them live."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from weightcast.layout import Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.receiver.base import LiveModel
from weightcast.receiver.exchange import CopyOut, Exchange
from weightcast.receiver.place import Place, new_storage


class Shadow:
    """One copy of the live storages, or two copies that take turns. ``memory`` is where the next round's bytes go.

    Where parameters may be rebound and the copy lies on their device, ``swap`` rebinds the parameters. Elsewhere ``swap`` moves bytes.
    """

    def __init__(self, model: LiveModel, manifest: Manifest, landings: Sequence[Placement], place: Place) -> None:
        self._model, self._manifest, self._landings = model, manifest, landings
        self.moves = model.relocatable and place.device == model.device
        """True: a swap makes the very storages live that were staged, so their digest is that of what is live."""
        self._copies = [self._copy_of(model.memory(), place) for _ in range(place.copies)]
        self._ways: dict[tuple[int, int], Exchange | CopyOut] = {}
        self._compiling = threading.Lock()
        self._landed: CopyOut | None = None

    @property
    def memory(self) -> Memory:
        """The memory for the next round's bytes: after a swap the storages that were live before, or the other one of two copies."""
        return self._copies[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all copies together."""
        return sum(copy.nbytes for copy in self._copies)

    def renew(self) -> bool:
        """Have a memory for the next round that nothing reads any more; whether it is another one than before."""
        if not self.moves:
            return False
        before = self._copies[0]
        self._copies[0] = self._model.spare(before)
        return self._copies[0] is not before

    @property
    def alternates(self) -> bool:
        """Whether a swap copies out of one of two copies, which take turns."""
        return not self.moves and len(self._copies) > 1

    def compile(self) -> None:
        """Compile what ``swap`` runs while the engine computes, because the first ``swap`` would compile it while the engine waits."""
        if not self.moves:
            live = self._model.memory()
            for copy in tuple(self._copies):
                self._way(live, copy).warm_up()

    def warm_up(self) -> None:
        """Have the model prepare for ``swap`` while the engine computes. All bytes of the round are staged."""
        if self.moves:
            self._model.derive(self.memory)

    def swap(self) -> None:
        """Make the staged bytes live and keep the former ones, in the shadow or in the other one of two copies.

        A second call undoes the first one. On a GPU the work is queued on the current stream.
        """
        live, staged = self._model.memory(), self.memory
        if self.moves:
            self._model.rebind(staged)
            self._copies = [live]
            return
        way = self._way(live, staged)
        way.run()
        if isinstance(way, CopyOut):
            self._landed = way
            self._copies.reverse()

    def landed_digest(self) -> int | None:
        """Return the digest of what the last swap made live, where the swap took a digest; otherwise None."""
        return None if self._landed is None else self._landed.total()

    def close(self) -> None:
        """Give up all copies. Nothing can be asked for afterwards."""
        self._copies.clear()
        self._ways.clear()
        self._landed = None

    def _way(self, live: Memory, staged: Memory) -> Exchange | CopyOut:
        """What makes a copy live, compiled once: by ``compile`` on another thread than the engine's, or by ``swap``."""
        key = (live.number, staged.number)
        with self._compiling:
            if key not in self._ways:
                if len(self._copies) > 1:
                    self._ways[key] = CopyOut(live, staged, self._landings, self._manifest)
                else:
                    self._ways[key] = Exchange(live, staged, self._landings)
            return self._ways[key]

    def _copy_of(self, live: Memory, place: Place) -> Memory:
        # A copy, not empty memory: bytes that no landing covers must be right after a swap by rebinding.
        storages = [new_storage(s.numel(), place, self._model).copy_(s) for s in live.storages]
        return combined(storages, self._model, is_arena=live.is_arena)


def combined(storages: Sequence[torch.Tensor], model: LiveModel, *, is_arena: bool) -> Memory:
    """A memory of storages that lie at the model's device or in the host's page-locked memory."""
    on_host = model.device.type == "cuda" and any(not storage.is_cuda for storage in storages)
    return Memory(storages, is_arena=is_arena, gpu=model.device if on_host else None)
