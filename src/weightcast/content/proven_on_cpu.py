"""Replay and digest on a CPU in one pass: a block is copied, then read back from where it landed and added to the digest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from weightcast.content.layout_digest import LayoutDigest
from weightcast.cpu.runs import Pieces, is_on_words
from weightcast.digest.formula import MASK, SLICE_NBYTES
from weightcast.digest.regions import run_of
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, as_run, landing_of, shared_landings, slices
from weightcast.plan.replay import Replay


class ProvenReplay:
    """The copies between two memories, which it keeps alive, and the digest of what they wrote.

    Copies that are strided, cast, share a landing or do not lie on words go one after the other and are digested afterwards.
    """

    def __init__(
        self, copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest, kernels: ModuleType
    ) -> None:
        self._memories = (src, dst)
        sources, targets = src.addresses, dst.addresses
        ranges: list[tuple[int, int, int, int]] = []
        rest: list[Copy] = []
        shared = shared_landings(copies)
        for index, copy in enumerate(copies):
            run, image = as_run(copy), run_of(landing_of(copy), manifest)
            if copy.nbytes and run is not None and image is not None and index not in shared:
                source = sources[run.src_storage] + run.src_offset
                target = targets[run.dst_storage] + run.dst_offset
                if is_on_words(source, target, image.position):
                    ranges.append((source, target, image.position, run.nbytes))
                    continue
            rest.append(copy)
        self._pieces = Pieces(ranges, kernels.copy_and_digest_ranges)
        self._replays = [Replay(part, src, dst) for part in slices(rest, SLICE_NBYTES)]
        landings = Layout(placements=tuple(map(landing_of, rest)), storage_nbytes=dst.sizes)
        self._rest = LayoutDigest(manifest, landings) if rest else None

    def run(self, check: Callable[[], None] = lambda: None) -> int:
        """Copy everything; returns the digest of all destinations, unsigned. ``check`` is called every few milliseconds and
        may raise."""
        total = self._pieces.run(check)
        for replay in self._replays:
            check()
            replay.run()
        if self._rest is not None:
            total += self._rest.of(self._memories[1], check)
        return total & MASK
