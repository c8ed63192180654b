"""Replay and digest on a GPU in one pass: a tile is copied, then read back from where it landed and added to the digest.

Load-bearing: the read-back is of the destination, after a barrier and past the first-level cache, so the digest is of what
lies in memory; it comes out of the second-level cache, which still holds what was just written, so it costs no second trip
to memory. Tiles are cut as in weightcast.cuda.digest, on block borders of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from weightcast.content.layout_digest import LayoutDigest
from weightcast.cuda.runs import CopyRuns, Launch, TileTable
from weightcast.cuda.term import term
from weightcast.digest.formula import BLOCK_WORDS, MASK, WORD_NBYTES, word_weights
from weightcast.digest.regions import run_of
from weightcast.layout import Layout, Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, as_run, landing_of, shared_landings
from weightcast.plan.replay import Boxes

TILE_BLOCKS = 1
CHUNK_WORDS = 2048
NUM_WARPS = 8


class ProvenReplay:
    """The copies between two memories of one GPU (or memory that this GPU can reach), and the digest of what they wrote.

    It keeps both memories alive. ``run()`` queues everything on the current stream; ``total()`` is the digest once that is done.
    """

    def __init__(
        self, copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest, device: torch.device
    ) -> None:
        self._memories = (src, dst)
        self.nbytes = sum(copy.nbytes for copy in copies)
        fused: list[tuple[int, int, int, int]] = []
        runs: list[tuple[int, int, int]] = []
        views: list[Copy] = []
        rest: list[Placement] = []
        shared = shared_landings(copies)
        for index, copy in enumerate(copies):
            if not copy.nbytes:
                continue
            landing = landing_of(copy)
            run, image = as_run(copy), run_of(landing, manifest)
            if run is None:
                views.append(copy)
                rest.append(landing)
                continue
            source = src.storages[run.src_storage].data_ptr() + run.src_offset
            target = dst.storages[run.dst_storage].data_ptr() + run.dst_offset
            if (
                image is not None
                and index not in shared
                and not (source | target | image.position | run.nbytes) % WORD_NBYTES
            ):
                fused.append((source, target, image.position, run.nbytes))
            else:
                runs.append((source, target, run.nbytes))
                rest.append(landing)
        self._fused = _ProvenRuns(fused, device)
        self._runs = CopyRuns(runs, device)
        self._boxes = Boxes(views, src, dst)
        sizes = tuple(storage.numel() for storage in dst.storages)
        self._rest = LayoutDigest(manifest, Layout(placements=tuple(rest), storage_nbytes=sizes)) if rest else None

    def warm_up(self) -> None:
        """Compile and load the kernels of ``run`` and ``total``; nothing is copied."""
        self._fused.warm_up()
        self._runs.warm_up()
        if self._rest is not None:
            self._rest.warm_up(self._memories[1])

    @torch.no_grad()
    def run(self) -> int:
        """Queue all copies; returns the bytes that will have been written."""
        self._fused.run()
        self._runs.run()
        self._boxes.run()
        return self.nbytes

    def total(self) -> int:
        """The digest of all destinations as they were written, unsigned; waits for the GPU."""
        rest = self._rest.of(self._memories[1]) if self._rest is not None else 0
        return (self._fused.total() + rest) & MASK


class _ProvenRuns:
    """Runs ``(source address, destination address, position in the image, bytes)``, all multiples of a word."""

    def __init__(self, runs: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
        table = torch.tensor(runs, dtype=torch.int64, device="cpu").reshape(-1, 4)
        source, target, position, nbytes = table.T.contiguous().unbind()
        end, tile_nbytes = position + nbytes, TILE_BLOCKS * BLOCK_WORDS * WORD_NBYTES
        tiles = TileTable(-(-end // tile_nbytes) - position // tile_nbytes, device)
        self._partials = torch.zeros(tiles.num_tiles, dtype=torch.int64, device=device)
        self._total = self._partials.sum()
        columns = (source - position, target - position, position, end, tiles.first_tiles, tiles.tile_runs)
        self._launch = Launch(
            _copy_and_digest,
            tiles.num_tiles,
            device,
            (*(column.to(device) for column in columns), word_weights(device), self._partials),
            TILE=TILE_BLOCKS * BLOCK_WORDS,
            BLOCK=BLOCK_WORDS,
            CHUNK=CHUNK_WORDS,
            num_warps=NUM_WARPS,
        )

    def warm_up(self) -> None:
        self._launch.warm_up()

    def run(self) -> None:
        self._launch.run()
        # Queued with the copies, it is there when they are.
        self._total = self._partials.sum()

    def total(self) -> int:
        return int(self._total) & MASK


@triton.jit  # type: ignore[untyped-decorator]
def _copy_and_digest(  # type: ignore[no-untyped-def]
    sources,
    targets,
    starts,
    ends,
    first_tiles,
    tile_runs,
    weights,
    partials,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Program p: the part of one run that lies in one tile of the image. Addresses and positions in bytes."""
    pid = tl.program_id(0)
    run = tl.load(tile_runs + pid)
    source = tl.load(sources + run)
    target = tl.load(targets + run)
    start = tl.load(starts + run)
    end = tl.load(ends + run)
    number = (pid - tl.load(first_tiles + run)).to(tl.int64)
    word0 = (start // (TILE * 8) + number) * TILE
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], dtype=tl.int64)
    a = (source + word0 * 8).to(tl.pointer_type(tl.int64))
    b = (target + word0 * 8).to(tl.pointer_type(tl.int64))
    if ((source | target) % 16 == 0) & (word0 * 8 >= start) & ((word0 + TILE) * 8 <= end):
        a = tl.multiple_of(a, 16)
        b = tl.multiple_of(b, 16)
        for at in tl.static_range(0, TILE, CHUNK):
            tl.store(b + at + offsets, tl.load(a + at + offsets))
        tl.debug_barrier()
        for at in tl.static_range(0, TILE, CHUNK):
            word = tl.load(b + at + offsets, volatile=True)
            weight = tl.load(weights + at % BLOCK + offsets)
            total += term(word, weight, (word0 + at) // BLOCK)
    else:
        low = tl.maximum(start // 8 - word0, 0)
        high = tl.minimum(end // 8 - word0, TILE)
        for chunk in range(low // CHUNK, tl.cdiv(high, CHUNK)):
            at = chunk * CHUNK + offsets
            mask = (at >= low) & (at < high)
            tl.store(b + at, tl.load(a + at, mask=mask, other=0), mask=mask)
        tl.debug_barrier()
        for chunk in range(low // CHUNK, tl.cdiv(high, CHUNK)):
            at = chunk * CHUNK + offsets
            mask = (at >= low) & (at < high)
            word = tl.load(b + at, mask=mask, other=0, volatile=True)
            weight = tl.load(weights + (chunk * CHUNK) % BLOCK + offsets)
            total += term(word, weight, (word0 + chunk * CHUNK) // BLOCK)
    tl.store(partials + pid, tl.sum(total))
